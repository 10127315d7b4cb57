// One end of a UDX stream with udx-native, for tests/hyperdht/udx/test_node.py. Takes one JSON argument:
//   id, remoteId, remotePort   the stream's ids and where the peer is
//   size                       bytes to send
//   reply                      true: send only once the peer has ended (half-closed stream)
//   keepOpen                   true: do not end after sending
//   destroyAfter               destroy the stream once so many bytes arrived
//   echoMessages               true: send each message back
// Prints JSON lines: listening, sent, end, message, close.
const { createHash, createCipheriv } = require('crypto')
const UDX = require('udx-native')

const options = JSON.parse(process.argv[2])
const udx = new UDX()
const socket = udx.createSocket()
socket.bind(0, '127.0.0.1')
const stream = udx.createStream(options.id)
const inHash = createHash('sha256')
const outHash = createHash('sha256')
let received = 0
let failure = null

function say (event, fields) {
  process.stdout.write(JSON.stringify({ event, ...fields }) + '\n')
}

async function send () {
  const noise = createCipheriv('aes-128-ctr', Buffer.alloc(16, 7), Buffer.alloc(16))
  let left = options.size || 0
  while (left > 0) {
    const chunk = noise.update(Buffer.alloc(Math.min(left, 64 * 1024)))
    outHash.update(chunk)
    left -= chunk.length
    if (!stream.write(chunk)) await new Promise((resolve) => stream.once('drain', resolve))
  }
  say('sent', { sha256: outHash.digest('hex') })
  if (!options.keepOpen) stream.end()
}

stream.on('data', (data) => {
  received += data.length
  inHash.update(data)
  if (options.destroyAfter && received >= options.destroyAfter) stream.destroy()
})
stream.on('end', () => {
  say('end', { bytes: received, sha256: inHash.digest('hex') })
  if (options.reply) send()
})
stream.on('message', (data) => {
  say('message', { hex: data.toString('hex') })
  if (options.echoMessages) stream.trySend(data)
})
stream.on('error', (error) => { failure = error.code || error.message })
stream.on('close', () => {
  say('close', { error: failure })
  socket.close()
})

stream.connect(socket, options.remoteId, options.remotePort, '127.0.0.1')
say('listening', { port: socket.address().port })
if (!options.reply) send()
