'use strict'
// A DHT network of its own in one process: config {size}, every node persistent, all on 127.0.0.1.
//
// events:   ready {bootstrap: ["host:port"], nodes: ["host:port", ...]}
// commands: kill {index} -> killed: destroy one node without a goodbye

const dgram = require('dgram')
const { HyperDHT, config, emit, openNode, serveCommands } = require('./control')

const HOST = '127.0.0.1'
const nodes = []

async function main() {
  const port = await freePort()
  const first = HyperDHT.bootstrapper(port, HOST, { host: HOST })
  nodes.push(first)
  await first.fullyBootstrapped()
  config.bootstrap = [`${HOST}:${port}`]
  while (nodes.length < (config.size || 6)) {
    const node = openNode({ ephemeral: false, firewalled: false })
    nodes.push(node)
    await node.fullyBootstrapped()
  }
  emit('ready', { bootstrap: config.bootstrap, nodes: nodes.map(nameOf) })
}

function nameOf(node) {
  return `${HOST}:${node.address().port}`
}

function freePort() {
  return new Promise((resolve, reject) => {
    const socket = dgram.createSocket('udp4')
    socket.once('error', reject)
    socket.bind(0, HOST, () => {
      const { port } = socket.address()
      socket.close(() => resolve(port))
    })
  })
}

async function kill({ index }) {
  await nodes[index].destroy({ force: true })
  emit('killed', { index })
}

async function cleanUp() {
  await Promise.allSettled(nodes.map((node) => node.destroy({ force: true })))
}

serveCommands({ kill }, cleanUp)
main()
