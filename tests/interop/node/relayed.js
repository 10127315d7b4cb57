'use strict'
// A peer that cannot be reached but through a relay: config {bootstrap, host?, relay?: KEY, serve?: true}.
//
// With `serve` it echoes, and never takes part in hole punching. Without, it connects on command and never tries a
// local path. `relay` is what it names in its handshake: relayThrough.
//
// events:   ready {publicKey?}, opened {address}, lost {error}
// commands: connect {key, bytes} -> result {ok, error, address}: sends so many bytes and compares what comes back
//           end: ends the connection cleanly -> ended {error}

const { body, config, describe, emit, openNode, serveCommands, sha256, writeAll } = require('./control')

const dht = openNode({ quickFirewall: false, ephemeral: true })
const relayThrough = config.relay ? Buffer.from(config.relay, 'hex') : null
let open = null

function serve() {
  const server = dht.createServer({ holepunch: () => false, shareLocalAddress: false, relayThrough }, (connection) => {
    emit('opened', { address: addressOf(connection) })
    connection.on('data', (data) => connection.write(data))
    connection.on('end', () => connection.end())
    connection.on('error', (error) => emit('lost', { error: describe(error) }))
    connection.on('close', () => emit('closed'))
  })
  return server.listen().then(() => emit('ready', { publicKey: server.publicKey.toString('hex') }))
}

function addressOf(connection) {
  return [connection.rawStream.remoteHost, connection.rawStream.remotePort]
}

async function connect({ key, bytes }) {
  const connection = dht.connect(Buffer.from(key, 'hex'), { fastOpen: false, localConnection: false, relayThrough })
  open = connection
  const digest = sha256()
  let left = bytes
  const received = new Promise((resolve, reject) => {
    connection.on('data', (data) => {
      digest.update(data)
      left -= data.length
      if (left <= 0) resolve(digest.digest('hex'))
    })
    connection.on('error', reject)
  })
  try {
    const [back] = await Promise.all([received, writeAll(connection, body(bytes))])
    const sent = sha256()
    for (const block of body(bytes)) sent.update(block)
    emit('result', { ok: back === sent.digest('hex'), address: addressOf(connection) })
    connection.on('error', (error) => emit('lost', { error: describe(error) }))
  } catch (error) {
    emit('result', { ok: false, error: describe(error) })
  }
}

function end() {
  return new Promise((resolve) => {
    open.once('close', () => resolve(emit('ended')))
    open.end()
  })
}

serveCommands({ connect, end }, () => dht.destroy({ force: true }))
if (config.serve) serve()
else dht.fullyBootstrapped().then(() => emit('ready'))
