'use strict'
// The application's wire contract, seen from Node: the pairing URL, sealing, and lines of JSON.

const { createCipheriv, createDecipheriv, randomBytes } = require('crypto')

const PREFIX = 'p2p-claude://connect?code='

function formatUrl(publicKey, dataKey, metadata) {
  const code = {
    v: 1,
    dhtPublicKey: publicKey.toString('base64'),
    dataKey: dataKey.toString('base64'),
    metadata
  }
  return PREFIX + Buffer.from(JSON.stringify(code)).toString('base64')
}

function parseUrl(url) {
  const code = JSON.parse(Buffer.from(url.slice(url.indexOf('code=') + 5), 'base64').toString())
  if (code.v !== 1) throw new Error('pairing code of another version')
  return {
    publicKey: Buffer.from(code.dhtPublicKey, 'base64'),
    dataKey: Buffer.from(code.dataKey, 'base64'),
    metadata: code.metadata
  }
}

// base64 of: version byte 0, nonce (12), ciphertext, tag (16).
function seal(dataKey, value) {
  const nonce = randomBytes(12)
  const cipher = createCipheriv('aes-256-gcm', dataKey, nonce)
  const text = Buffer.concat([cipher.update(JSON.stringify(value), 'utf8'), cipher.final()])
  return Buffer.concat([Buffer.from([0]), nonce, text, cipher.getAuthTag()]).toString('base64')
}

function unseal(dataKey, sealed) {
  const bytes = Buffer.from(sealed, 'base64')
  if (bytes.length < 29 || bytes[0] !== 0) throw new Error('not a sealed value')
  const decipher = createDecipheriv('aes-256-gcm', dataKey, bytes.subarray(1, 13))
  decipher.setAuthTag(bytes.subarray(bytes.length - 16))
  const text = Buffer.concat([decipher.update(bytes.subarray(13, -16)), decipher.final()])
  return JSON.parse(text.toString('utf8'))
}

// Feed bytes, get whole lines as text. Split before decoding, so that no character is ever cut; the pieces of an
// unfinished line are kept apart, so that a line of megabytes is joined once.
class LineBuffer {
  constructor() {
    this.pieces = []
  }

  feed(data) {
    const lines = []
    for (let start = 0; start < data.length; ) {
      const newline = data.indexOf(10, start)
      if (newline < 0) {
        this.pieces.push(data.subarray(start))
        break
      }
      this.pieces.push(data.subarray(start, newline))
      lines.push(Buffer.concat(this.pieces).toString('utf8'))
      this.pieces = []
      start = newline + 1
    }
    return lines
  }
}

module.exports = { LineBuffer, formatUrl, parseUrl, seal, unseal }
