'use strict'
// A HyperDHT server: config {bootstrap, host?, seed?, private?: PORT, persistent?, deny?, options?}: deny turns every client
// away, options are for createServer.
//
// The client's first line says what a connection is for:
//   echo\n            everything comes back; the end is answered with the end
//   sink\n            everything is read; at the end comes its SHA-256 in hex, then the end
//   source N\n        N bytes of the deterministic body, then the end
//   stay\n            one newline comes back, then the connection is held open until the client ends it
//
// events:   ready {publicKey, port}, connection {id, remoteKey, remoteAddress},
//           closed {id, bytes, error, opened}: opened says that the first line arrived (false: a half-open one)
// commands: refresh, suspend, resume (each answered by its name), close (stop listening), abort {id} (destroy one connection), stats -> stats {open, rss}

const { HyperDHT, body, config, describe, emit, keyPairOf, openNode, serveCommands, sha256, writeAll } = require('./control')

const HOST = config.host || '127.0.0.1'
const dht = config.private
  ? HyperDHT.bootstrapper(config.private, HOST, { host: HOST })
  : openNode(config.persistent ? { ephemeral: false, firewalled: false } : {})
const server = dht.createServer({ firewall: () => Boolean(config.deny), ...config.options }, onconnection)
const connections = new Map()
let lastId = 0

async function main() {
  await server.listen(keyPairOf(config.seed))
  emit('ready', { publicKey: server.publicKey.toString('hex'), port: dht.address().port })
}

function onconnection(connection) {
  const id = ++lastId
  const state = { id, bytes: 0, error: null, opened: false, job: null, head: Buffer.alloc(0) }
  connections.set(id, connection)
  const { remoteHost, remotePort } = connection.rawStream
  emit('connection', {
    id,
    remoteKey: connection.remotePublicKey.toString('hex'),
    remoteAddress: [remoteHost, remotePort]
  })
  connection.on('error', (error) => (state.error = describe(error)))
  connection.on('close', () => {
    connections.delete(id)
    emit('closed', { id, bytes: state.bytes, error: state.error, opened: state.opened })
  })
  connection.on('data', (data) => ondata(connection, state, data))
  connection.on('end', () => (state.job ? state.job.end() : connection.end()))
}

function ondata(connection, state, data) {
  if (state.job) {
    state.bytes += data.length
    return state.job.data(data)
  }
  state.head = Buffer.concat([state.head, data])
  const newline = state.head.indexOf(10)
  if (newline < 0) return
  const words = state.head.subarray(0, newline).toString().split(' ')
  const rest = state.head.subarray(newline + 1)
  state.opened = true
  state.job = JOBS[words[0]](connection, Number(words[1] || 0))
  if (rest.length) ondata(connection, state, rest)
}

const JOBS = {
  echo(connection) {
    // Pausing the reader until the writer has room is what keeps a slow client from filling this process.
    const data = (bytes) => {
      if (connection.write(bytes)) return
      connection.pause()
      connection.once('drain', () => connection.resume())
    }
    return { data, end: () => connection.end() }
  },
  sink(connection) {
    const digest = sha256()
    const end = () => {
      connection.write(Buffer.from(digest.digest('hex')))
      connection.end()
    }
    return { data: (bytes) => digest.update(bytes), end }
  },
  source(connection, total) {
    writeAll(connection, body(total)).then(() => connection.end())
    return { data() {}, end() {} }
  },
  stay(connection) {
    connection.write(Buffer.from('\n'))
    return { data() {}, end: () => connection.end() }
  }
}

serveCommands(
  {
    refresh: () => server.refresh(),
    suspend: async () => {
      await dht.suspend()
      emit('suspend')
    },
    resume: async () => {
      await dht.resume()
      emit('resume')
    },
    close: async () => {
      await server.close()
      emit('listening-ended')
    },
    abort: ({ id }) => connections.get(id).destroy(),
    stats: () => emit('stats', { open: connections.size, rss: process.memoryUsage().rss })
  },
  () => dht.destroy()
)
main()
