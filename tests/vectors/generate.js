'use strict'
// Writes the golden vectors beside this file, with the packages that node talks to the network with.
//
//     NODE_PATH=tests/interop/node_modules node tests/vectors/generate.js
//
// Randomness is seeded, so that the same versions write the same bytes. Each file has "versions" and "vectors"; bytes
// are hex, addresses "host:port".

const fs = require('fs')
const path = require('path')
const { EventEmitter } = require('events')
const sodium = require('sodium-universal')

const PACKAGES = [
  'hyperdht', 'dht-rpc', '@hyperswarm/secret-stream', 'noise-handshake', 'noise-curve-ed', 'compact-encoding',
  'compact-encoding-net', 'sodium-universal', 'sodium-native', 'sodium-secretstream', 'blind-relay', 'protomux',
  'hyperdht-address', 'nat-sampler'
]

// ---- seeded randomness, for this script and for the packages

let state = 0x2545f491
function random (n) { // xorshift32
  state ^= state << 13
  state ^= state >>> 17
  state ^= state << 5
  return (state >>> 0) % n
}

function bytes (n) {
  const b = Buffer.alloc(n)
  for (let i = 0; i < n; i++) b[i] = random(256)
  return b
}

Math.random = () => random(2 ** 31) / 2 ** 31
sodium.randombytes_buf = (out) => { bytes(out.byteLength).copy(out) }
let header = null // of the next secret stream
sodium.crypto_secretstream_xchacha20poly1305_init_push = (out, head, key) => {
  head.set(header)
  sodium.crypto_secretstream_xchacha20poly1305_init_pull(out, head, key)
}

// ---- helpers

const c = require('compact-encoding')
const net = require('compact-encoding-net')
const m = require('hyperdht/lib/messages')
const { NS } = require('hyperdht/lib/constants')
const Persistent = require('hyperdht/lib/persistent')
const SecurePayload = require('hyperdht/lib/secure-payload')
const NoiseWrap = require('hyperdht/lib/noise-wrap')
const { hash, createKeyPair } = require('hyperdht/lib/crypto')
const peerId = require('dht-rpc/lib/peer').id
const IO = require('dht-rpc/lib/io')
const curve = require('noise-curve-ed')
const SecretStream = require('@hyperswarm/secret-stream')
const Protomux = require('protomux')
const BlindRelay = require('blind-relay')
const NatSampler = require('nat-sampler')
const hypercoreCrypto = require('hypercore-crypto')

const hex = (b) => b === null || b === undefined ? null : Buffer.from(b).toString('hex')
const maybe = (make) => random(2) ? make() : null
const address = () => ({ host: Array.from(bytes(4)).join('.'), port: random(65536) })
const list = (n, make) => Array.from({ length: random(n + 1) }, make)
const text = (a) => a === null || a === undefined ? null : a.host + ':' + a.port
const texts = (l) => l === null ? null : l.map(text)
const number = () => [random(253), random(65536), random(2 ** 31) * 2, random(2 ** 21) * 2 ** 32 + random(2 ** 31)][random(4)]
const encode = (codec, value) => hex(c.encode(codec, value))
const times = (n, make) => Array.from({ length: n }, (_, i) => make(i))

function version (name) {
  for (let dir of [process.env.NODE_PATH, ...require.resolve.paths(name)]) {
    const file = path.join(dir || '', name, 'package.json')
    if (dir && fs.existsSync(file)) return JSON.parse(fs.readFileSync(file)).version
  }
  throw new Error('not found: ' + name)
}

function write (name, vectors) {
  const versions = Object.fromEntries(PACKAGES.map((p) => [p, version(p)]))
  const body = Object.entries(vectors).map(([k, v]) => {
    if (!Array.isArray(v)) return `  ${JSON.stringify(k)}: ${JSON.stringify(v)}`
    return `  ${JSON.stringify(k)}: [\n    ${v.map((e) => JSON.stringify(e)).join(',\n    ')}\n  ]`
  })
  const head = `"versions": ${JSON.stringify(versions)}`
  fs.writeFileSync(path.join(__dirname, name + '.json'), `{${head},\n"vectors": {\n${body.join(',\n')}\n}}\n`)
}

// ---- compact encoding

function encodings () {
  const numbers = [0, 1, 252, 253, 255, 256, 65535, 65536, 4294967295, 4294967296, Number.MAX_SAFE_INTEGER]
  const buffers = [0, 1, 252, 253, 400].map(bytes)
  const v6 = ['2001:db8::1', '::1', 'fe80::1:2:3', '1:2:3:4:5:6:7:8', '::']
  write('encoding', {
    uint: numbers.map((n) => [n, encode(c.uint, n)]),
    nonminimal: [['fd0100', 1], ['fe01000000', 1], ['ff0100000000000000', 1]].map(([h, n]) => {
      if (c.decode(c.uint, Buffer.from(h, 'hex')) !== n) throw new Error('not a form of ' + n)
      return [h, n]
    }),
    buffer: buffers.map((b) => [hex(b), encode(c.buffer, b)]),
    string: ['', 'blind-relay', 'ünïcødé \u{1F980}', 'x'.repeat(300)].map((s) => [s, encode(c.string, s)]),
    ipv4: times(10, address).map((a) => [text(a), encode(net.ipv4Address, a)]),
    ipv6: v6.map((host) => { const port = random(65536); return [host, port, encode(net.ipv6Address, { host, port })] }),
    array: times(4, () => list(8, address)).map((l) => [texts(l), encode(c.array(net.ipv4Address), l)])
  })
}

// ---- dht-rpc datagrams, caught where they would leave

function datagrams () {
  const sent = []
  const socket = (name) => ({ trySend: (buffer, port, host) => sent.push({ name, to: host + ':' + port, hex: hex(buffer) }) })
  const requests = []
  const responses = []
  const nodes = { id: bytes(32), closer: [], closest: () => nodes.closer }

  function io () {
    const it = new IO(nodes, { watchNetworkInterfaces: () => new EventEmitter() }, {})
    it.clientSocket = socket('client')
    it.serverSocket = socket('server')
    return it
  }

  for (let i = 0; i < 60; i++) {
    const it = io()
    const persistent = i % 2 === 1
    it.ephemeral = !persistent
    it.firewalled = !persistent
    const to = address()
    const token = maybe(() => bytes(32))
    const target = maybe(() => bytes(32))
    const value = maybe(() => bytes([0, 1, 33, 300][random(4)]))
    const internal = random(2) === 1
    const command = i < 50 ? random(11) : number()
    const request = it.createRequest(to, token, internal, command, target, value, null)
    const buffer = request._encodeRequest(token, value, to, request.socket)
    requests.push({
      tid: request.tid, to: text(to), command, internal, id: persistent ? hex(nodes.id) : null, token: hex(token),
      target: hex(target), value: hex(value), hex: hex(buffer)
    })

    // The same request arrives at a node, which answers.
    const from = address()
    from.port = from.port || 1
    const answers = io()
    answers.ephemeral = !persistent
    answers.onrequest = (incoming) => {
      incoming.token = null
      nodes.closer = list(20, address)
      const error = [0, 0, 1, 2, 16, 17][random(6)]
      const reply = maybe(() => bytes([0, 1, 33, 300][random(4)]))
      const [withToken, withNodes] = [random(2) === 1, random(2) === 1]
      incoming.sendReply(error, reply, withToken, withNodes)
      const closer = target && withNodes ? nodes.closer : []
      responses.push({
        tid: request.tid, to: text(from), id: persistent ? hex(nodes.id) : null,
        token: withToken ? hex(answers.token(from, 1)) : null, closer_nodes: texts(closer), error, value: hex(reply),
        hex: sent.pop().hex
      })
    }
    if (token) answers._secrets = [bytes(32), bytes(32)]
    const plain = token === null ? buffer : request._encodeRequest(null, value, to, request.socket)
    answers.onmessage(answers.serverSocket, plain, from)
  }

  // A relayed request keeps the tid; a wrong token is answered with a right one.
  const it = io()
  it.ephemeral = false
  it._secrets = [bytes(32), bytes(32)]
  const tokens = []
  const asker = { host: '10.9.8.7', port: 5555 }
  for (const i of [0, 1]) tokens.push({ host: asker.host, secret: hex(it._secrets[i]), token: hex(it.token(asker, i)) })
  write('datagrams', { requests, responses, tokens })
}

// ---- hyperdht's messages

function messages () {
  const peer = () => ({ publicKey: bytes(32), relayAddresses: list(3, address) })
  const peerOf = (p) => p && ({ public_key: hex(p.publicKey), relay_addresses: texts(p.relayAddresses) })
  const vectors = {}
  const put = (name, n, make) => { vectors[name] = times(n, make) }

  put('handshake', 20, () => {
    const v = { mode: random(5), noise: bytes(random(300)), peerAddress: maybe(address), relayAddress: maybe(address) }
    const f = { mode: v.mode, noise: hex(v.noise), peer_address: text(v.peerAddress), relay_address: text(v.relayAddress) }
    return { ...f, hex: encode(m.handshake, v) }
  })
  put('noise_payload', 80, () => {
    const v = {
      error: random(4),
      firewall: random(4),
      holepunch: maybe(() => ({ id: number(), relays: list(3, () => ({ relayAddress: address(), peerAddress: address() })) })),
      addresses4: list(4, address),
      addresses6: [['2001:db8::1', 'fe80::1'][random(2)]].filter(() => random(4) === 0).map((host) => ({ host, port: random(65536) })),
      udx: maybe(() => ({ reusableSocket: random(2) === 1, id: random(2 ** 31) * 2, seq: random(2) * random(65536) })),
      secretStream: maybe(() => ({})),
      relayThrough: maybe(() => ({ publicKey: bytes(32), token: bytes(32) })),
      relayAddresses: maybe(() => list(3, address))
    }
    return {
      error: v.error,
      firewall: v.firewall,
      holepunch: v.holepunch && { id: v.holepunch.id, relays: v.holepunch.relays.map((r) => [text(r.relayAddress), text(r.peerAddress)]) },
      addresses4: texts(v.addresses4),
      addresses6: v.addresses6.map((a) => [a.host, a.port]),
      udx: v.udx && [v.udx.reusableSocket, v.udx.id, v.udx.seq],
      secret_stream: v.secretStream !== null,
      relay_through: v.relayThrough && [hex(v.relayThrough.publicKey), hex(v.relayThrough.token)],
      relay_addresses: texts(v.relayAddresses),
      hex: encode(m.noisePayload, v)
    }
  })
  put('holepunch', 20, () => {
    const v = { mode: random(5), id: number(), payload: bytes(random(200)), peerAddress: maybe(address) }
    return { mode: v.mode, id: v.id, payload: hex(v.payload), peer_address: text(v.peerAddress), hex: encode(m.holepunch, v) }
  })
  put('holepunch_payload', 60, () => {
    const v = {
      error: random(4),
      firewall: random(4),
      round: random(20),
      connected: random(2) === 1,
      punching: random(2) === 1,
      addresses: maybe(() => list(4, address)),
      remoteAddress: maybe(address),
      token: maybe(() => bytes(32)),
      remoteToken: maybe(() => bytes(32))
    }
    const { error, firewall, round, connected, punching } = v
    const f = { error, firewall, round, connected, punching, addresses: texts(v.addresses), remote_address: text(v.remoteAddress) }
    return { ...f, token: hex(v.token), remote_token: hex(v.remoteToken), hex: encode(m.holepunchPayload, v) }
  })
  put('peer', 10, () => { const p = peer(); return { ...peerOf(p), hex: encode(m.peer, p) } })
  put('announce', 30, () => {
    const v = { peer: maybe(peer), refresh: maybe(() => bytes(32)), signature: maybe(() => bytes(64)), bump: random(2) * number() }
    return { peer: peerOf(v.peer), refresh: hex(v.refresh), signature: hex(v.signature), bump: v.bump, hex: encode(m.announce, v) }
  })
  put('lookup_reply', 12, () => {
    const peers = list(20, peer)
    const bump = random(2) * number()
    const raw = { peers: peers.map((p) => c.encode(m.peer, p)), bump }
    return { peers: peers.map(peerOf), bump, hex: encode(m.lookupRawReply, raw) }
  })
  put('mutable_put', 10, () => {
    const v = { publicKey: bytes(32), seq: number(), value: bytes(random(400)), signature: bytes(64) }
    const f = { public_key: hex(v.publicKey), seq: v.seq, value: hex(v.value), signature: hex(v.signature) }
    return { ...f, hex: encode(m.mutablePutRequest, v) }
  })
  put('mutable_get_reply', 10, () => {
    const v = { seq: number(), value: bytes(random(400)), signature: bytes(64) }
    return { seq: v.seq, value: hex(v.value), signature: hex(v.signature), hex: encode(m.mutableGetResponse, v) }
  })
  put('mutable_signable', 5, () => {
    const v = { seq: number(), value: bytes(random(300)) }
    return { seq: v.seq, value: hex(v.value), hex: encode(m.mutableSignable, v) }
  })
  put('plugin_request', 6, () => {
    const v = { plugin: ['', 'x', 'some-plugin'][random(3)], version: number(), command: number(), value: maybe(() => bytes(random(50))) }
    return { ...v, value: hex(v.value), hex: encode(m.pluginRequest, v) }
  })
  put('peer_address', 6, () => {
    const key = bytes(32)
    const nodes = maybe(() => [address(), ...list(3, address)])
    return { public_key: hex(key), nodes: texts(nodes || []), hex: hex(require('hyperdht-address').encode(key, nodes)) }
  })
  write('messages', vectors)
}

// ---- keys, hashes, signatures, boxes

function crypto () {
  const [initiator, responder, send] = hypercoreCrypto.namespace('hyperswarm/secret-stream', 3)
  const pairs = times(4, () => bytes(32)).map((seed) => ({ seed, ...createKeyPair(seed) }))
  const announces = times(6, (i) => {
    const { seed, publicKey, secretKey } = pairs[i % 4]
    const [target, token, id] = [bytes(32), bytes(32), bytes(32)]
    const ann = { peer: { publicKey, relayAddresses: list(3, address) }, refresh: maybe(() => bytes(32)) }
    return {
      seed: hex(seed), target: hex(target), token: hex(token), node_id: hex(id), peer: encode(m.peer, ann.peer),
      refresh: hex(ann.refresh), announce: hex(Persistent.signAnnounce(target, token, id, ann, { secretKey })),
      unannounce: hex(Persistent.signUnannounce(target, token, id, ann, { secretKey }))
    }
  })
  const mutables = times(4, (i) => {
    const [seq, value] = [number(), bytes(random(300))]
    const signature = Persistent.signMutable(seq, value, { secretKey: pairs[i].secretKey })
    return { seed: hex(pairs[i].seed), seq, value: hex(value), signature: hex(signature) }
  })
  const boxes = times(5, () => {
    const key = bytes(32)
    const payload = { error: random(4), firewall: random(4), round: random(9), connected: false, punching: true }
    const box = new SecurePayload(key)
    const from = address()
    const token = hex(box.token(from))
    return {
      key: hex(key), plaintext: encode(m.holepunchPayload, payload), box: hex(box.encrypt(payload)),
      local_secret: hex(box._localSecret), host: from.host, token
    }
  })
  const bad = ['00'.repeat(32), '01' + '00'.repeat(31), 'ec' + 'ff'.repeat(30) + '7f', 'ff'.repeat(32), '02' + '00'.repeat(31)]
  write('crypto', {
    namespaces: Object.entries({
      ...NS, INITIATOR: initiator, RESPONDER: responder, SEND: send
    }).map(([name, value]) => [name, hex(value)]),
    hashes: [0, 1, 6, 32, 200].map(bytes).map((b) => [hex(b), hex(hash(b))]),
    key_pairs: pairs.map((p) => ({ seed: hex(p.seed), public_key: hex(p.publicKey), secret_key: hex(p.secretKey) })),
    dh: times(6, (i) => {
      const [a, b] = [pairs[i % 4], pairs[(i + 1 + random(3)) % 4]]
      return { seed: hex(a.seed), public_key: hex(b.publicKey), secret: hex(curve.dh(b.publicKey, a)) }
    }),
    refused_points: bad.filter((point) => {
      try { curve.dh(Buffer.from(point, 'hex'), pairs[0]) } catch { return true }
      return false
    }),
    node_ids: times(6, address).map((a) => [text(a), hex(peerId(a.host, a.port))]),
    announces,
    mutables,
    boxes
  })
}

// ---- Noise

function noise () {
  write('noise', {
    handshakes: times(6, (i) => {
      const [a, b, e1, e2] = times(4, () => bytes(32)).map((seed) => ({ seed, ...createKeyPair(seed) }))
      const client = new NoiseWrap(a, b.publicKey)
      const server = new NoiseWrap(b, null)
      client.handshake.e = e1
      server.handshake.e = e2
      const first = { error: 0, firewall: random(4), addresses4: list(4, address), udx: { reusableSocket: true, id: random(2 ** 31), seq: 0 }, secretStream: {} }
      const second = { error: 0, firewall: random(4), addresses4: list(i * 10, address), relayAddresses: list(3, address) }
      // Each side gets a copy: it clears the peer's ephemeral key in it when it is done.
      const message1 = client.send(first)
      server.recv(Buffer.from(message1))
      const message2 = server.send(second)
      client.recv(Buffer.from(message2))
      const final = client.final()
      return {
        initiator: hex(a.seed), responder: hex(b.seed), ephemerals: [hex(e1.seed), hex(e2.seed)],
        payloads: [encode(m.noisePayload, first), encode(m.noisePayload, second)],
        messages: [hex(message1), hex(message2)], hash: hex(final.hash), tx: hex(final.tx), rx: hex(final.rx),
        holepunch_secret: hex(final.holepunchSecret), remote_id: hex(final.remoteId)
      }
    })
  })
}

// ---- secret stream, protomux and blind relay: real streams over a pipe that notes what passes

class Pipe extends EventEmitter {
  constructor () {
    super()
    this.written = []
    this.sent = []
    this.peer = null
  }

  write (data) {
    this.written.push(Buffer.from(data))
    if (this.peer) setImmediate(() => this.peer.emit('data', Buffer.from(data)))
    return true
  }

  send (data) { this.sent.push(Buffer.from(data)) }
  end () {}
  destroy () {}
  pause () {}
  resume () {}
}

const turn = () => new Promise((resolve) => setTimeout(resolve, 5))

async function streams () {
  const vectors = []
  for (const isInitiator of [true, false]) {
    const keys = { tx: bytes(32), rx: bytes(32), hash: bytes(64) }
    const pair = createKeyPair(bytes(32))
    const pipe = new Pipe()
    header = bytes(24)
    const stream = new SecretStream(isInitiator, pipe, { handshake: { ...keys, publicKey: pair.publicKey, remotePublicKey: pair.publicKey } })
    const plaintexts = ['68656c6c6f', '', hex(bytes(1)), hex(bytes(253)), hex(bytes(2000)), '', '656e64']
    for (const plaintext of plaintexts) stream.write(Buffer.from(plaintext, 'hex'))
    await turn()
    const initial = Buffer.from(stream._sendState.subarray(72))
    const messages = ['70696e67', '', hex(bytes(900))]
    for (const message of messages) stream.send(Buffer.from(message, 'hex'))
    vectors.push({
      is_initiator: isInitiator, hash: hex(keys.hash), tx: hex(keys.tx), rx: hex(keys.rx), header: hex(header), plaintexts,
      frames: pipe.written.map(hex), counter: hex(initial), messages, sealed: pipe.sent.map(hex)
    })
    stream.destroy()
  }
  write('secretstream', { streams: vectors })
}

async function muxes () {
  const [a, b] = [new Pipe(), new Pipe()]
  a.peer = b
  b.peer = a
  const [left, right] = [a, b].map((pipe) => { pipe.userData = null; pipe.destroyed = false; return new Protomux(pipe) })
  const id = bytes(32)
  const options = (extra) => ({
    protocol: 'blind-relay', id, messages: [{ encoding: BlindRelayMessages.pair }, { encoding: BlindRelayMessages.unpair }], ...extra
  })
  const frames = []
  const note = (name, fields, pipe) => frames.push({ name, ...fields, hex: hex(pipe.written[pipe.written.length - 1]) })

  const one = left.createChannel(options())
  one.open()
  note('open', { id: 1, protocol: 'blind-relay', channel_id: hex(id), handshake: '' }, a)
  const two = right.createChannel(options())
  two.open()
  await turn()
  const pair = { isInitiator: true, token: bytes(32), id: 0x11223344, seq: 0 }
  one.messages[0].send(pair)
  note('message', { id: 1, type: 0, payload: encode(BlindRelayMessages.pair, pair) }, a)
  const other = left.createChannel({ protocol: 'other', handshake: c.uint, messages: [{ encoding: c.raw }] })
  other.open(300)
  note('open', { id: 2, protocol: 'other', channel_id: null, handshake: encode(c.uint, 300) }, a)
  await turn()
  note('reject', { id: 2 }, b)
  one.close()
  note('close', { id: 1 }, a)

  const third = right.createChannel({ protocol: 'batch', messages: [{ encoding: c.raw }, { encoding: c.raw }] })
  const fourth = right.createChannel({ protocol: 'batch-2', messages: [{ encoding: c.raw }] })
  third.open()
  fourth.open()
  left.createChannel({ protocol: 'batch' }).open()
  left.createChannel({ protocol: 'batch-2' }).open()
  await turn()
  right.cork()
  const parts = [[third, 0, '0102'], [third, 1, ''], [fourth, 0, hex(bytes(300))]]
  for (const [channel, type, payload] of parts) channel.messages[type].send(Buffer.from(payload, 'hex'))
  const ids = parts.map(([channel, type, payload]) => ({ id: channel._localId, type, payload }))
  fourth.close()
  right.uncork()
  note('batch', { messages: ids, close: ids[2].id }, b)

  write('protomux', {
    frames,
    pair: times(8, () => {
      const v = { isInitiator: random(2) === 1, token: bytes(32), id: random(2 ** 31) * 2, seq: random(2) * random(65536) }
      return { is_initiator: v.isInitiator, token: hex(v.token), id: v.id, seq: v.seq, hex: encode(BlindRelayMessages.pair, v) }
    }),
    unpair: times(2, () => { const token = bytes(32); return { token: hex(token), hex: encode(BlindRelayMessages.unpair, { token }) } })
  })
}

// blind-relay keeps its codecs to itself: take them from a channel it makes.
const BlindRelayMessages = (() => {
  const pipe = new Pipe()
  pipe.userData = null
  const client = new BlindRelay.Client(pipe, { id: Buffer.alloc(32) })
  const [pair, unpair] = client._channel.messages.map((message) => message.encoding)
  return { pair, unpair }
})()

// ---- NAT sampler

function nats () {
  const runs = times(30, () => {
    const sampler = new NatSampler()
    const hosts = ['1.2.3.4', '5.6.7.8', '9.9.9.9'].slice(0, 1 + random(3))
    const ports = 1 + random(3)
    const noise = random(8)
    return times(60, (i) => {
      const odd = random(10) < noise
      const [host, port] = odd ? [hosts[random(hosts.length)], 1000 + random(ports)] : [hosts[i > 40 ? hosts.length - 1 : 0], 1000]
      sampler.add(host, port)
      return [host, port, sampler.host, sampler.port, sampler.size]
    })
  })
  write('nat', { runs })
}

async function main () {
  encodings()
  datagrams()
  messages()
  crypto()
  noise()
  await streams()
  await muxes()
  nats()
  process.exit(0)
}

main()
