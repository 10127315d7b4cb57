'use strict'
// A client with the habits of the TypeScript chat client: a new key pair for each run, 10 s for a connection and 30 s for
// an answer, several requests in flight on one connection, get-output with clear every 500 ms.
//
// config: {bootstrap, url, dataKey? (hex: another key than the URL's)}
// commands: call {tag, method, params} -> answer {tag, ok, result | error}
//           raw {line} or {hex}        -> sent as it is (a line gets its newline); every response that belongs to no
//                                         call comes as response {response}
//           chat {directory, text, sessionId?} -> spawned {sessionId, result}, sent {result}, then output {data, timestamp} each,
//                until unpoll; poll {sessionId} and unpoll {} by themselves
// events:   ready, closed {error}

const { randomUUID } = require('crypto')
const { HyperDHT, config, describe, emit, openNode, serveCommands } = require('./control')
const { LineBuffer, parseUrl, seal, unseal } = require('./wire')

const CONNECT_MS = 10000
const ANSWER_MS = 30000
const POLL_MS = 500

const pairing = parseUrl(config.url)
const dataKey = config.dataKey ? Buffer.from(config.dataKey, 'hex') : pairing.dataKey
const dht = openNode({ keyPair: HyperDHT.keyPair() })
const waiting = new Map()
let connection = null
let poller = null
let lastId = 0

function connect() {
  const lines = new LineBuffer()
  connection = dht.connect(pairing.publicKey)
  const timer = setTimeout(() => connection.destroy(new Error('connection timed out')), CONNECT_MS)
  let lost = null
  connection.on('open', () => {
    clearTimeout(timer)
    emit('ready')
  })
  connection.on('data', (data) => {
    for (const line of lines.feed(data)) settle(JSON.parse(line))
  })
  connection.on('error', (error) => (lost = describe(error)))
  connection.on('close', () => {
    clearInterval(poller)
    clearTimeout(timer)
    for (const { reject } of waiting.values()) reject(new Error('connection closed'))
    emit('closed', { error: lost })
  })
}

function settle(response) {
  const call = waiting.get(response.id)
  if (!call) return emit('response', { response })
  waiting.delete(response.id)
  clearTimeout(call.timer)
  if (response.ok) call.resolve(response.result === undefined ? {} : unseal(dataKey, response.result))
  else call.reject(new Error(response.error))
}

function call(method, params) {
  const id = `${Date.now()}-${++lastId}`
  return new Promise((resolve, reject) => {
    const timer = setTimeout(() => {
      waiting.delete(id)
      reject(new Error('no answer in time'))
    }, ANSWER_MS)
    waiting.set(id, { resolve, reject, timer })
    write(JSON.stringify({ id, method, params: seal(dataKey, params) }))
  })
}

function write(line) {
  connection.write(Buffer.from(line + '\n'))
}

async function chat({ directory, text, sessionId = randomUUID() }) {
  const result = await call('spawn-session', { directory, sessionId, permissionMode: 'acceptEdits' })
  emit('spawned', { sessionId, result })
  if (result.type !== 'success') return
  poll({ sessionId })
  emit('sent', { result: await call('send-message', { sessionId, text }) })
}

// Ticks do not wait for each other: a slow answer leaves several polls in flight, as it does with theirs.
function poll({ sessionId }) {
  clearInterval(poller)
  poller = setInterval(async () => {
    const { messages } = await call('get-output', { sessionId, clear: true }).catch(() => ({ messages: [] }))
    for (const { type, data, timestamp } of messages) emit('output', { type, data, timestamp })
  }, POLL_MS)
}

const commands = {
  async call({ tag, method, params = {} }) {
    const outcome = await call(method, params).then(
      (result) => ({ ok: true, result }),
      (error) => ({ ok: false, error: error.message })
    )
    emit('answer', { tag, ...outcome })
  },
  raw: ({ line, hex }) => (hex ? connection.write(Buffer.from(hex, 'hex')) : write(line)),
  chat,
  poll,
  unpoll: () => clearInterval(poller)
}

serveCommands(commands, () => {
  if (connection) connection.end()
  return dht.destroy({ force: true })
})
connect()
