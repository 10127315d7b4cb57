'use strict'
// A HyperDHT client: config {bootstrap, host?}.
//
// commands: connect {key, job: "echo"|"sink"|"source"|"stay", bytes, count, parallel, fresh, timeout, options} -> `count` times
//             result {i, ok, opened, openMs, bodyMs, totalMs, bytes, sha256, sent, error}, then done.
//             opened: "open" was emitted; ok: the whole exchange went round. opened without ok is a half-open connection.
//             bodyMs: from open to the last byte. fresh: a DHT node of its own for every connection. timeout: milliseconds for one whole exchange.
//             options: for dht.connect, such as {localConnection: false}.
//           ping {key, count, bytes} -> pings {ms: [...]}: echo round trips on one connection
//           stats -> stats {rss}

const { body, config, describe, emit, openNode, serveCommands, sha256, writeAll } = require('./control')

const dht = openNode()

async function connect(command) {
  const { count = 1, parallel = 1 } = command
  let next = 0
  const worker = async () => {
    while (next < count) emit('result', await exchange(next++, command))
  }
  await Promise.all(Array.from({ length: Math.min(parallel, count) }, worker))
  emit('done')
}

async function exchange(i, { key, job = 'echo', bytes = 64, fresh = false, timeout = 30000, options = {} }) {
  const node = fresh ? openNode() : dht
  const started = performance.now()
  const connection = node.connect(Buffer.from(key, 'hex'), { ...options })
  const result = { i, ok: false, opened: false, bytes: 0 }
  connection.on('open', () => {
    result.opened = true
    result.openMs = performance.now() - started
  })
  const timer = setTimeout(() => connection.destroy(new Error('no answer in time')), timeout)
  try {
    const { at, ...outcome } = await JOBS[job](connection, bytes)
    Object.assign(result, outcome, { bodyMs: at - started - result.openMs })
  } catch (error) {
    result.error = describe(error)
  }
  clearTimeout(timer)
  result.totalMs = performance.now() - started
  connection.destroy()
  if (fresh) await node.destroy({ force: true })
  return result
}

// Everything the server sends until its end; rejects when the connection is lost before.
function receive(connection) {
  const digest = sha256()
  let bytes = 0
  let text = Buffer.alloc(0)
  return new Promise((resolve, reject) => {
    connection.on('data', (data) => {
      bytes += data.length
      digest.update(data)
      if (text.length < 128) text = Buffer.concat([text, data.subarray(0, 128)])
    })
    connection.on('end', () => {
      const at = performance.now()
      resolve({ at, bytes, sha256: digest.digest('hex'), text: text.toString('latin1') })
    })
    connection.on('error', reject)
    connection.on('close', () => reject(new Error('closed before the end')))
  })
}

function digestOf(total) {
  const digest = sha256()
  for (const block of body(total)) digest.update(block)
  return digest.digest('hex')
}

async function send(connection, line, total) {
  connection.write(Buffer.from(line + '\n'))
  await writeAll(connection, body(total))
  connection.end()
}

const JOBS = {
  async echo(connection, total) {
    const [back] = await Promise.all([receive(connection), send(connection, 'echo', total)])
    const sent = digestOf(total)
    return { ok: back.sha256 === sent, bytes: back.bytes, sha256: back.sha256, sent, at: back.at }
  },
  async sink(connection, total) {
    const [back] = await Promise.all([receive(connection), send(connection, 'sink', total)])
    const sent = digestOf(total)
    return { ok: back.text === sent, bytes: total, sha256: back.text, sent, at: back.at }
  },
  async source(connection, total) {
    const got = receive(connection)
    connection.write(Buffer.from(`source ${total}\n`))
    const back = await got
    connection.end()
    const sent = digestOf(total)
    return { ok: back.sha256 === sent, bytes: back.bytes, sha256: back.sha256, sent, at: back.at }
  },
  stay(connection) {
    connection.write(Buffer.from('stay\n'))
    connection.on('error', (error) => emit('lost', { error: describe(error) }))
    return new Promise((resolve, reject) => {
      connection.once('data', () => {
        emit('staying')
        connection.on('close', () => resolve({ ok: true }))
      })
      connection.on('close', () => reject(new Error('closed before the end')))
    })
  }
}

async function ping({ key, count = 100, bytes = 64 }) {
  const connection = dht.connect(Buffer.from(key, 'hex'))
  const payload = Buffer.alloc(bytes, 120)
  const ms = []
  connection.write(Buffer.from('echo\n'))
  for (let i = 0; i < count; i++) {
    const started = performance.now()
    connection.write(payload)
    await receiveExactly(connection, bytes)
    ms.push(performance.now() - started)
  }
  connection.end()
  emit('pings', { ms })
}

function receiveExactly(connection, bytes) {
  let left = bytes
  return new Promise((resolve, reject) => {
    const settle = (done, value) => {
      connection.off('data', ondata)
      connection.off('error', onerror)
      done(value)
    }
    const ondata = (data) => {
      left -= data.length
      if (left <= 0) settle(resolve)
    }
    const onerror = (error) => settle(reject, error)
    connection.on('data', ondata)
    connection.on('error', onerror)
  })
}

serveCommands(
  { connect, ping, stats: () => emit('stats', { rss: process.memoryUsage().rss }) },
  () => dht.destroy({ force: true })
)
dht.fullyBootstrapped().then(() => emit('ready'))
