'use strict'
// A daemon written from the wire contract, with the TypeScript daemon's habits and none of our additions.
//
// config: {bootstrap, claude: [command, ...], dataDir?, rootDir?, isoDates?}. With dataDir its identity is kept there in
// the shared format. events: ready {url}, request {method}, connection {remoteKey}, session-exit {sessionId, code}.

const { spawn } = require('child_process')
const { randomBytes, randomUUID } = require('crypto')
const fs = require('fs')
const os = require('os')
const path = require('path')
const { HyperDHT, config, emit, openNode, serveCommands } = require('./control')
const { LineBuffer, formatUrl, seal, unseal } = require('./wire')

const MOST_MESSAGES = 1000
const KEPT_MESSAGES = 500
const MODES = ['default', 'acceptEdits', 'bypassPermissions', 'plan']

const { keyPair, dataKey, createdAt } = loadIdentity()
const dht = openNode()
const server = dht.createServer(onconnection)
const sessions = new Map()

async function main() {
  await server.listen(keyPair)
  const metadata = { host: os.hostname(), platform: os.platform(), createdAt }
  if (config.rootDir) metadata.rootDir = config.rootDir
  emit('ready', { url: formatUrl(keyPair.publicKey, dataKey, metadata) })
}

function loadIdentity() {
  const fresh = { keyPair: HyperDHT.keyPair(), dataKey: randomBytes(32), createdAt: Date.now() }
  if (!config.dataDir) return fresh
  const keysPath = path.join(config.dataDir, 'dht-keypair.json')
  const dataPath = path.join(config.dataDir, 'encryption.key')
  const text = (bytes) => bytes.toString('base64')
  const bytes = (base64) => Buffer.from(base64, 'base64')
  if (!fs.existsSync(keysPath)) {
    const { publicKey, secretKey } = fresh.keyPair
    fs.mkdirSync(config.dataDir, { recursive: true, mode: 0o700 })
    fs.writeFileSync(keysPath, JSON.stringify({ publicKey: text(publicKey), secretKey: text(secretKey) }), { mode: 0o600 })
    const key = { key: text(fresh.dataKey), createdAt: fresh.createdAt }
    fs.writeFileSync(dataPath, JSON.stringify(key), { mode: 0o600 })
  }
  const keys = JSON.parse(fs.readFileSync(keysPath))
  const data = JSON.parse(fs.readFileSync(dataPath))
  const loaded = { publicKey: bytes(keys.publicKey), secretKey: bytes(keys.secretKey) }
  return { keyPair: loaded, dataKey: bytes(data.key), createdAt: data.createdAt }
}

function onconnection(connection) {
  const lines = new LineBuffer()
  emit('connection', { remoteKey: connection.remotePublicKey.toString('hex') })
  connection.on('error', () => {})
  connection.on('end', () => connection.end())
  connection.on('data', (data) => {
    for (const line of lines.feed(data)) answer(connection, line)
  })
}

async function answer(connection, line) {
  const reply = (response) => connection.write(Buffer.from(JSON.stringify(response) + '\n'))
  let id = 'unknown'
  try {
    const request = JSON.parse(line)
    id = request.id
    emit('request', { method: request.method })
    const method = METHODS[request.method]
    if (!method) throw new Error('Unknown method: ' + request.method)
    const result = await method(request.params ? unseal(dataKey, request.params) : {})
    reply({ id, ok: true, result: seal(dataKey, result) })
  } catch (error) {
    reply({ id, ok: false, error: error.message })
  }
}

const METHODS = {
  'spawn-session': spawnSession,
  'send-message': sendMessage,
  'get-output': getOutput,
  'stop-session': stopSession,
  'list-sessions': () => [...sessions.values()].map(({ sessionId, pid, createdAt }) => ({ sessionId, pid, createdAt })),
  'get-session-state': () => sessionState(),
  ping: () => ({ pong: true, timestamp: Date.now() })
}

// Refuse what the contract refuses, then wait for the child to exist: a missing directory or command shows there.
function spawnSession({ directory, sessionId = randomUUID(), permissionMode = 'acceptEdits', model }) {
  const failed = (errorMessage) => ({ type: 'error', errorMessage })
  if (directory === undefined) return failed('directory is required')
  if (!MODES.includes(permissionMode)) return failed('Invalid permission mode')
  if (config.rootDir && !isInside(config.rootDir, directory)) return failed('Directory is outside the root directory')
  const args = ['--output-format', 'stream-json', '--input-format', 'stream-json', '--verbose']
  args.push('--permission-mode', permissionMode)
  if (model) args.push('--model', model)
  const env = { ...process.env, CLAUDE_CODE_ENTRYPOINT: 'p2p-daemon' }
  const [command, ...before] = config.claude
  const child = spawn(command, [...before, ...args], { cwd: directory, env, stdio: ['pipe', 'pipe', 'inherit'] })
  return new Promise((resolve) => {
    child.once('error', (error) => resolve(failed(error.message)))
    child.once('spawn', () => {
      openSession(sessionId, directory, child)
      resolve({ type: 'success', sessionId, pid: child.pid })
    })
  })
}

function isInside(root, directory) {
  const relative = path.relative(fs.realpathSync(root), fs.realpathSync(directory))
  return relative === '' || (!relative.startsWith('..') && !path.isAbsolute(relative))
}

function openSession(sessionId, directory, child) {
  const createdAt = config.isoDates ? new Date().toISOString() : Date.now()
  const session = { sessionId, directory, pid: child.pid, createdAt, child, messages: [] }
  const lines = new LineBuffer()
  sessions.set(sessionId, session)
  child.stdin.on('error', () => {})
  child.stdout.on('data', (data) => {
    for (const line of lines.feed(data)) keep(session, line)
  })
  child.on('exit', (code) => {
    sessions.delete(sessionId)
    emit('session-exit', { sessionId, code })
    publish()
  })
  publish()
}

function keep(session, line) {
  if (!line.trim()) return
  session.messages.push({ type: 'session-output', data: JSON.parse(line), timestamp: Date.now() })
  if (session.messages.length > MOST_MESSAGES) session.messages = session.messages.slice(-KEPT_MESSAGES)
}

function sendMessage({ sessionId, text }) {
  const session = sessions.get(sessionId)
  if (!session) return { success: false, error: 'Session not found' }
  const message = { type: 'user', message: { role: 'user', content: text } }
  session.child.stdin.write(JSON.stringify(message) + '\n')
  return { success: true }
}

function getOutput({ sessionId, clear }) {
  const session = sessions.get(sessionId)
  if (!session) return { messages: [] }
  const { messages } = session
  if (clear) session.messages = []
  return { messages }
}

function stopSession({ sessionId }) {
  const session = sessions.get(sessionId)
  if (!session) return { success: false }
  session.child.kill('SIGTERM')
  sessions.delete(sessionId)
  return { success: true }
}

function sessionState() {
  const state = [...sessions.values()].map(({ sessionId, pid, createdAt, directory }) => {
    return { sessionId, pid, createdAt, directory }
  })
  return { sessions: state, updatedAt: Date.now() }
}

// Theirs stores the record in clear, and always under sequence number 0.
function publish() {
  dht.mutablePut(keyPair, Buffer.from(JSON.stringify(sessionState()))).catch(() => {})
}

async function cleanUp() {
  for (const { child } of sessions.values()) child.kill('SIGTERM')
  await server.close()
  await dht.destroy()
}

serveCommands({}, cleanUp)
main()
