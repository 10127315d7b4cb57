'use strict'
// A DHT network of its own in one process, every node persistent: config {size} for nodes on 127.0.0.1, or
// {hosts: [...]} for one on each of these addresses.
//
// events:   ready {bootstrap: ["host:port"], nodes: ["host:port", ...], version: of hyperdht}
// commands: kill {index} -> killed: destroy one node without a goodbye

const dgram = require('dgram')
const { HyperDHT, config, emit, library, openNode, serveCommands } = require('./control')

const hosts = config.hosts || Array(config.size || 6).fill('127.0.0.1')
const nodes = []

async function main() {
  const [host] = hosts
  const port = await freePort()
  const first = HyperDHT.bootstrapper(port, host, { host })
  nodes.push(first)
  await first.fullyBootstrapped()
  config.bootstrap = [`${host}:${port}`]
  while (nodes.length < hosts.length) {
    const node = openNode({ ephemeral: false, firewalled: false, host: hosts[nodes.length] })
    nodes.push(node)
    await node.fullyBootstrapped()
  }
  const { version } = library('/package.json')
  emit('ready', { bootstrap: config.bootstrap, nodes: nodes.map(nameOf), version })
}

function nameOf(node) {
  return `${hosts[nodes.indexOf(node)]}:${node.address().port}`
}

// As tests/kit/free_ports.py does: none that the kernel gives to who asks for any, before it is bound again.
function freePort() {
  return new Promise((resolve, reject) => {
    const socket = dgram.createSocket('udp4')
    socket.once('error', (error) => (error.code === 'EADDRINUSE' ? resolve(freePort()) : reject(error)))
    socket.bind(10240 + Math.floor(Math.random() * 22528), hosts[0], () => {
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
