
// Talking to the server.
const api = (() => {
  const TOKEN = "gptlab.token", session = storeOf("sessionStorage");
  const given = new URLSearchParams(location.hash.slice(1)).get("token");
  if (given) { // not left in the address, which is shown and copied
    session.setItem(TOKEN, given);
    history.replaceState(null, "", location.pathname);
  }

  class Failure extends Error {
    constructor(message, status) {
      super(message);
      this.status = status;
    }
  }

  async function ask(path, body, signal) {
    const headers = {};
    const token = session.getItem(TOKEN);
    if (token) headers.Authorization = `Bearer ${token}`;
    if (body) headers["Content-Type"] = "application/json";
    let answer;
    try {
      answer = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Failure("The server does not answer. Is gptlab serve still running?", 0);
    }
    if (answer.ok) return answer;
    const told = await answer.json().catch(() => null);
    throw new Failure(told?.error?.message || `The server answered with ${answer.status}.`, answer.status);
  }

  // The chunks of a streamed answer.
  async function* stream(path, body, signal) {
    const answer = await ask(path, body, signal);
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let held = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) throw new Failure("The server left before the answer was whole.", 0);
      held += value;
      let end;
      while ((end = held.indexOf("\n\n")) >= 0) {
        const line = held.slice(0, end);
        held = held.slice(end + 2);
        if (!line.startsWith("data: ")) continue;
        const data = line.slice(6);
        if (data === "[DONE]") return;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new Failure(chunk.error.message, 500);
        yield chunk;
      }
    }
  }

  return {
    stream, Failure,
    json: async (path, body) => (await ask(path, body)).json(),
    useToken: (token) => session.setItem(TOKEN, token),
  };
})();
