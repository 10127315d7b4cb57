'use strict'
// The leanest Node script that does what p2pclaude-ls does: one connection, one list-sessions, one line printed each.
// Arguments: the bootstrap node, the pairing URL, and "say-when" to have the times of `open` and the answer on stderr.
// The benchmark runs it beside the real tool.

const HyperDHT = require('hyperdht')
const { LineBuffer, parseUrl, seal, unseal } = require('./wire')

const { publicKey, dataKey } = parseUrl(process.argv[3])
const dht = new HyperDHT({ bootstrap: [process.argv[2]] })
const started = performance.now()
const connection = dht.connect(publicKey)
const sayWhen = (what) => process.argv[4] && console.error(`${what} ${performance.now() - started}`)
connection.on('open', () => sayWhen('open'))
const lines = new LineBuffer()

connection.on('data', (data) => {
  for (const line of lines.feed(data)) print(JSON.parse(line))
})
connection.on('error', (error) => {
  console.error(error.message)
  process.exitCode = 1
})
connection.write(JSON.stringify({ id: '1', method: 'list-sessions', params: seal(dataKey, {}) }) + '\n')

function print(response) {
  sayWhen('answered')
  for (const session of unseal(dataKey, response.result)) {
    console.log([session.sessionId, session.state, session.pid, session.createdAt, session.directory].join('\t'))
  }
  connection.destroy()
  dht.destroy({ force: true })
}
