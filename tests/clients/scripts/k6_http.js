// Twenty chats of 8 tokens by four users.
import http from 'k6/http';
import { check } from 'k6';

export const options = { scenarios: { chat: { executor: 'shared-iterations', vus: 4, iterations: 20 } } };

export default function () {
  const body = JSON.stringify({
    model: __ENV.MODEL, max_tokens: 8, ignore_eos: true,
    messages: [{ role: 'user', content: `Count to ${__ITER}.` }],
  });
  const answer = http.post(`${__ENV.URL}/v1/chat/completions`, body, {
    headers: { 'Content-Type': 'application/json' },
  });
  check(answer, {
    'answered': (r) => r.status === 200,
    'eight tokens': (r) => r.json('usage.completion_tokens') === 8,
  });
}
