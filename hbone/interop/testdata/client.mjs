// An HBONE client: node client.mjs PORT TARGET DIR carries stdin and stdout through a
// CONNECT tunnel, with cert.pem, key.pem and root.pem of DIR. Exit status 2 and the answer's
// status on stderr when it was not 200.
import http2 from 'node:http2';
import fs from 'node:fs';
import { pipeline } from 'node:stream';

const [port, target, dir] = process.argv.slice(2);
const file = (name) => fs.readFileSync(`${dir}/${name}`);
const fail = (err) => { console.error(err.code ?? err.message); process.exit(3); };
const session = http2.connect(`https://127.0.0.1:${port}`, {
  cert: file('cert.pem'), key: file('key.pem'), ca: file('root.pem'),
  minVersion: 'TLSv1.3', checkServerIdentity: () => undefined,
});
session.on('error', fail);
const stream = session.request({ ':method': 'CONNECT', ':authority': target, 'baggage': 'service.name=node' });
stream.on('error', fail);
stream.on('response', (headers) => {
  if (headers[':status'] !== 200) {
    console.error(`status ${headers[':status']}`);
    process.exit(2);
  }
  pipeline(process.stdin, stream, (err) => { if (err) fail(err); });
  pipeline(stream, process.stdout, (err) => { if (err) fail(err); session.close(); });
});
