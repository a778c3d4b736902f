// The server's doors. Every failure is an Error with one line to show; `status` is 0 where there was no answer.

async function ask(method, path, body) {
  let answer;
  try {
    answer = await fetch(path, {
      method,
      headers: body === undefined ? {} : {'Content-Type': 'application/json'},
      body: body === undefined ? undefined : JSON.stringify(body),
    });
  } catch {
    throw Object.assign(new Error('the server does not answer; is it still running?'), {status: 0});
  }
  if (answer.ok) return answer;
  const detail = await answer.json().then((content) => content.detail, () => answer.statusText);
  throw Object.assign(new Error(String(detail)), {status: answer.status});
}

const json = async (...request) => (await ask(...request)).json();
const of = (kind, name) => `/api/${kind}/${encodeURIComponent(name)}`;

export const project = () => json('GET', '/api/project');
export const addClass = (name) => json('POST', '/api/classes', {name});
export const strokes = (name) => json('GET', of('strokes', name));
export const save = (name, document) => json('PUT', of('strokes', name), document);
export const region = (name, x, y) => json('POST', of('region', name), {x, y});
export const next = () => json('GET', '/api/next');
export const training = () => json('GET', '/api/train');
export const train = () => json('POST', '/api/train', {});
export const stopTraining = () => json('DELETE', '/api/train');
export const exportAll = () => json('POST', '/api/export', {});
export const photo = async (name) => createImageBitmap(await (await ask('GET', of('images', name))).blob());
export const thumbnailUrl = (name) => of('thumbnails', name);

/** The class map as a picture, and what it was made with: strokes, model, both or nothing. */
export async function predict(name) {
  const answer = await ask('POST', of('predict', name));
  return {source: answer.headers.get('x-prediction'), image: await createImageBitmap(await answer.blob())};
}
