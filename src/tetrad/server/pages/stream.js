// The server's API: an answer as a stream of parts, and the score of one.

async function refusal(answer) {
  const body = await answer.json().catch(() => ({}));
  return new Error(body.error?.message || `HTTP ${answer.status}`);
}

function post(path, body, signal) {
  return fetch(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal });
}

// Yields {text, tokens, reason}. Throws what the server refuses, also in the middle of a stream.
export async function* answers(body, signal) {
  const answer = await post("/v1/chat/completions", body, signal);
  if (!answer.ok) throw await refusal(answer);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ; ) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      const data = line.startsWith("data:") ? line.slice(5).trim() : "";
      if (!data || data === "[DONE]") continue;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      const [choice] = chunk.choices;
      if (choice) yield { text: choice.delta.content || "", tokens: choice.logprobs?.content || [], reason: choice.finish_reason };
    }
  }
}

// The reward of an answer. finished: whether it ended by itself.
export async function score(messages, text, finished) {
  const answer = await post("/v1/reward", { samples: [{ messages, text, finished }] });
  if (!answer.ok) throw await refusal(answer);
  return (await answer.json()).scores[0];
}
