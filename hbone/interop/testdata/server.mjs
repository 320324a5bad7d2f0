// An HBONE server: node server.mjs TARGET DIR prints its port and echoes tunnels to TARGET,
// with cert.pem, key.pem and root.pem of DIR. Another target is answered 503.
import http2 from 'node:http2';
import fs from 'node:fs';

const [target, dir] = process.argv.slice(2);
const file = (name) => fs.readFileSync(`${dir}/${name}`);
const server = http2.createSecureServer({
  cert: file('cert.pem'), key: file('key.pem'), ca: file('root.pem'),
  requestCert: true, rejectUnauthorized: true, minVersion: 'TLSv1.3', allowHTTP1: false,
});
server.on('stream', (stream, headers) => {
  stream.on('error', () => {});
  const strict = headers[':method'] === 'CONNECT' && headers[':path'] === undefined && headers[':scheme'] === undefined;
  if (!strict || headers[':authority'] !== target) {
    stream.respond({ ':status': strict ? 503 : 400 }, { endStream: true });
    return;
  }
  stream.respond({ ':status': 200, 'baggage': 'service.name=node' });
  stream.pipe(stream);
});
server.on('sessionError', () => {});
server.listen(0, '127.0.0.1', () => console.log(server.address().port));
