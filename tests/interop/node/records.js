'use strict'
// DHT records: config {bootstrap, host?, persistent?}. Values, keys, seeds and targets are hex.
//
// commands (each answers with the event of its own name, or with failed {tag, error}):
//   mutable-put {seed, value, seq}   mutable-get {publicKey, seq?} -> {seq, value} or {missing: true}
//   immutable-put {value} -> {target}   immutable-get {target} -> {value} or {missing: true}
//   announce {target, seed}   unannounce {target, seed}   lookup {target} -> {peers: [publicKey, ...]}
//   find-peer {publicKey} -> {peers: [...], nodes: ["host:port", ...]}
//   ask-mutable-put {node: "host:port", seed, value, seq} -> {error}: one node's own answer to a put, its error code kept
//   holders {publicKey, nodes: ["host:port", ...]} -> {nodes}: those that answer FIND_PEER from their own store
//   where -> {address}

const c = require('compact-encoding')
const { HyperDHT, config, emit, keyPairOf, library, openNode, serveCommands } = require('./control')
const messages = library('/lib/messages')
const Persistent = library('/lib/persistent')

const FIND_PEER = 2
const MUTABLE_PUT = 6
const MUTABLE_GET = 7
const dht = openNode(config.persistent ? { ephemeral: false, firewalled: false } : {})
const bytes = (hex) => Buffer.from(hex, 'hex')
const addressOf = (node) => ({ host: node.split(':')[0], port: Number(node.split(':')[1]) })
const hex = (buffer) => Buffer.from(buffer).toString('hex')

const handlers = {
  async 'mutable-put'({ seed, value, seq = 0 }) {
    const { publicKey } = await dht.mutablePut(keyPairOf(seed), bytes(value), { seq })
    return { publicKey: hex(publicKey), seq }
  },
  async 'mutable-get'({ publicKey, seq = 0 }) {
    const found = await dht.mutableGet(bytes(publicKey), { seq })
    return found ? { seq: found.seq, value: hex(found.value) } : { missing: true }
  },
  async 'immutable-put'({ value }) {
    const { hash } = await dht.immutablePut(bytes(value))
    return { target: hex(hash) }
  },
  async 'immutable-get'({ target }) {
    const found = await dht.immutableGet(bytes(target))
    return found ? { value: hex(found.value) } : { missing: true }
  },
  async announce({ target, seed }) {
    await dht.announce(bytes(target), keyPairOf(seed), []).finished()
    return {}
  },
  async unannounce({ target, seed }) {
    await dht.unannounce(bytes(target), keyPairOf(seed))
    return {}
  },
  async lookup({ target }) {
    const peers = new Set()
    for await (const reply of dht.lookup(bytes(target))) {
      for (const peer of reply.peers) peers.add(hex(peer.publicKey))
    }
    return { peers: [...peers] }
  },
  async 'find-peer'({ publicKey }) {
    const peers = new Set()
    const nodes = new Set()
    for await (const reply of dht.findPeer(bytes(publicKey))) {
      peers.add(hex(reply.peer.publicKey))
      nodes.add(`${reply.from.host}:${reply.from.port}`)
    }
    return { peers: [...peers], nodes: [...nodes] }
  },
  async 'ask-mutable-put'({ node, seed, value, seq }) {
    const to = addressOf(node)
    const keyPair = keyPairOf(seed)
    const target = HyperDHT.hash(keyPair.publicKey)
    const zero = c.encode(c.uint, 0)
    const { token } = await dht.request({ command: MUTABLE_GET, target, value: zero }, to)
    const signature = await Persistent.signMutable(seq, bytes(value), keyPair)
    const put = { publicKey: keyPair.publicKey, seq, value: bytes(value), signature }
    const request = { command: MUTABLE_PUT, target, token, value: c.encode(messages.mutablePutRequest, put) }
    const reply = await dht.request(request, to)
    return { error: reply.error }
  },
  async holders({ publicKey, nodes }) {
    const target = HyperDHT.hash(bytes(publicKey))
    const ask = (node) => dht.request({ command: FIND_PEER, target, value: null }, addressOf(node))
    const replies = await Promise.all(nodes.map(ask))
    return { nodes: nodes.filter((_, i) => replies[i].value) }
  },
  async where() {
    const { host, port } = dht.address()
    return { address: `${host}:${port}` }
  }
}

const commands = {}
for (const [name, handler] of Object.entries(handlers)) {
  commands[name] = async (command) => emit(name, { tag: command.tag, ...(await handler(command)) })
}
serveCommands(commands, () => dht.destroy({ force: true }))
dht.fullyBootstrapped().then(() => emit('ready'))
