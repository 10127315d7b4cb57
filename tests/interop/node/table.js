'use strict'
// A persistent DHT node that shows its routing table and asks others bare questions: config {bootstrap, host?}.
//
// commands (each answers with the event of its own name, or with failed {tag, error}):
//   table -> {nodes: ["host:port", ...]}
//   where -> {address, id}
//   find-node {target} -> {closest: ["host:port", ...]}: a whole walk
//   ask {node, command, internal?, target?, value?, token?} -> {error, value, token, closer: [...], id, to}: one request

const { emit, openNode, serveCommands } = require('./control')

const dht = openNode({ ephemeral: false, firewalled: false })
const bytes = (text) => (text === undefined || text === null ? null : Buffer.from(text, 'hex'))
const hex = (buffer) => (buffer ? Buffer.from(buffer).toString('hex') : null)
const addressOf = (node) => ({ host: node.split(':')[0], port: Number(node.split(':')[1]) })
const nameOf = ({ host, port }) => `${host}:${port}`

function ask({ node, command, internal = false, target, value, token }) {
  const to = { id: null, ...addressOf(node) }
  return new Promise((resolve, reject) => {
    const request = dht.io.createRequest(to, bytes(token), internal, command, bytes(target), bytes(value), null)
    request.onresponse = resolve
    request.onerror = reject
    request.send()
  })
}

const handlers = {
  async table() {
    return { nodes: dht.table.toArray().map(nameOf) }
  },
  async where() {
    return { address: nameOf({ host: dht.host, port: dht.address().port }), id: hex(dht.id) }
  },
  async 'find-node'({ target }) {
    const query = dht.findNode(bytes(target))
    await query.finished()
    return { closest: query.closestNodes.map(nameOf) }
  },
  async ask(command) {
    const reply = await ask(command)
    return {
      error: reply.error,
      value: hex(reply.value),
      token: hex(reply.token),
      closer: (reply.closerNodes || []).map(nameOf),
      id: hex(reply.from.id),
      to: nameOf(reply.to)
    }
  }
}

const commands = {}
for (const [name, handler] of Object.entries(handlers)) {
  commands[name] = async (command) => emit(name, { tag: command.tag, ...(await handler(command)) })
}
serveCommands(commands, () => dht.destroy({ force: true }))
dht.fullyBootstrapped().then(() => emit('ready'))
