'use strict'
// A blind relay of the npm package, on a HyperDHT node: config {bootstrap, host?, seed?}.
//
// events:   ready {publicKey}, paired, session-error {error}
// commands: stats -> stats {sessions, matched, pending, active}: active counts links

const BlindRelay = require('blind-relay')
const { describe, emit, keyPairOf, config, openNode, serveCommands } = require('./control')

const dht = openNode() // no node that others would miss when it leaves
const relay = new BlindRelay.Server({ createStream: (options) => dht.createRawStream({ ...options, framed: true }) })
const server = dht.createServer({ shareLocalAddress: false }, (connection) => {
  const session = relay.accept(connection, { id: connection.remotePublicKey })
  session.on('pair', () => emit('paired'))
  session.on('error', (error) => emit('session-error', { error: describe(error) }))
  connection.on('error', () => {}) // clients come and go
})

function stats() {
  const { sessions, pairings } = relay.stats
  emit('stats', { sessions: sessions.active, matched: pairings.matched, pending: pairings.pending, active: pairings.active })
}

serveCommands({ stats }, async () => {
  await relay.close()
  await dht.destroy({ force: true })
})
server.listen(keyPairOf(config.seed)).then(() => emit('ready', { publicKey: server.publicKey.toString('hex') }))
