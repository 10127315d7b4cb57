'use strict'
// What every script here shares: configuration in, events out, commands in, and an end that always comes.
//
// A script is started as `node SCRIPT.js JSON`. It prints one JSON object a line on stdout ({event: ...}) and reads one
// JSON object a line from stdin ({cmd: ...}). The end of stdin means that the controller is gone: the script cleans up
// and exits, so that no process outlives the tests.

const { createHash } = require('crypto')
const readline = require('readline')

// A peer that vanished may never answer a goodbye; nobody waits longer for it.
const GOODBYE_MS = 2000

const config = JSON.parse(process.argv[2] || '{}')

// Which of the installed versions: `hyperdht` or one of its aliases in package.json.
const library = (path) => require(`${config.hyperdht || 'hyperdht'}${path}`)
const HyperDHT = library('')

function emit(event, fields = {}) {
  process.stdout.write(JSON.stringify({ event, ...fields }) + '\n')
}

// Run commands one after the other or side by side, as they come; `handlers` maps a command's name to an async function.
function serveCommands(handlers, cleanUp) {
  const lines = readline.createInterface({ input: process.stdin })
  let leaving = null
  const leave = () => {
    if (!leaving) leaving = Promise.resolve(cleanUp()).catch(report).then(() => process.exit(0))
    setTimeout(() => process.exit(0), GOODBYE_MS).unref()
  }
  lines.on('line', (line) => {
    const command = JSON.parse(line)
    const handler = handlers[command.cmd]
    const answer = handler ? handler(command) : Promise.reject(new Error('no such command: ' + command.cmd))
    Promise.resolve(answer).catch((error) => emit('failed', { tag: command.tag, error: describe(error) }))
  })
  lines.on('close', leave)
  process.on('SIGTERM', leave)
  process.on('SIGINT', leave)
}

function report(error) {
  process.stderr.write((error && error.stack) || String(error))
  process.stderr.write('\n')
}

// The code is what tests compare (PEER_NOT_FOUND, ETIMEDOUT, ...); the text is for people.
function describe(error) {
  return error ? { code: error.code || error.name || 'Error', message: error.message } : null
}

function openNode(options = {}) {
  return new HyperDHT({ bootstrap: config.bootstrap || [], host: config.host || '127.0.0.1', ...options })
}

function keyPairOf(seedHex) {
  return seedHex ? HyperDHT.keyPair(Buffer.from(seedHex, 'hex')) : HyperDHT.keyPair()
}

// The deterministic body that both languages make and check: 64 KiB blocks of SHAKE-256 output, each with its own number
// in the first eight bytes, so that a lost, doubled or moved block changes the digest.
const BLOCK_BYTES = 65536
const BLOCK = createHash('shake256', { outputLength: BLOCK_BYTES }).update('p2pclaude').digest()

function* body(total) {
  for (let index = 0, left = total; left > 0; index++, left -= BLOCK_BYTES) {
    const block = Buffer.from(BLOCK)
    block.writeBigUInt64LE(BigInt(index))
    yield left < BLOCK_BYTES ? block.subarray(0, left) : block
  }
}

// Write everything with respect for back-pressure; resolves when the last block was handed over.
async function writeAll(stream, blocks) {
  for (const block of blocks) {
    if (stream.destroyed || stream.destroying) return
    if (!stream.write(block)) await drained(stream)
  }
}

function drained(stream) {
  return new Promise((resolve) => {
    const done = () => {
      stream.off('drain', done)
      stream.off('close', done)
      resolve()
    }
    stream.on('drain', done)
    stream.on('close', done)
  })
}

module.exports = {
  HyperDHT,
  body,
  config,
  describe,
  emit,
  keyPairOf,
  library,
  openNode,
  report,
  serveCommands,
  sha256: () => createHash('sha256'),
  writeAll
}
