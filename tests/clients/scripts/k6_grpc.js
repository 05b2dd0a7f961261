// Twenty streamed chats over gRPC; the messages are known by reflection.
import grpc from 'k6/net/grpc';
import { check } from 'k6';

export const options = { scenarios: { chat: { executor: 'shared-iterations', vus: 2, iterations: 20 } } };

const client = new grpc.Client();
let isConnected = false;

export default function () {
  if (!isConnected) {
    client.connect(__ENV.GRPC, { plaintext: true, reflect: true });
    isConnected = true;
  }
  const stream = new grpc.Stream(client, 'baton.v1.Inference/Chat');
  let tokens = 0;
  let usage = null;
  return new Promise((resolve) => {
    stream.on('data', (delta) => {
      tokens += (delta.tokenIds || []).length;
      usage = delta.usage || usage;
    });
    stream.on('error', () => resolve(check(null, { 'no error': () => false })));
    stream.on('end', () => {
      check(usage, {
        'usage says eight': (u) => u !== null && u.completionTokens === 8,
        'eight tokens came': () => tokens === 8,
      });
      resolve();
    });
    stream.write({
      model: __ENV.MODEL, sampling: { maxTokens: 8, ignoreEos: true },
      messages: [{ role: 'user', content: `Count to ${__ITER}.` }],
    });
    stream.end();
  });
}
