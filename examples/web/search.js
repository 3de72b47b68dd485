// A search of images without a server: transformers.js runs the query encoder, and the vectors of the images, of 8 bits
// a value, are in memory.
import { AutoTokenizer, CLIPTextModelWithProjection, env } from "@huggingface/transformers";

// Everything comes from beside this page.
env.allowRemoteModels = false;
env.allowLocalModels = true;
env.localModelPath = "./";
env.useBrowserCache = false; // that of HTTP notices a new model of the same name
env.backends.onnx.wasm.wasmPaths = new URL("node_modules/onnxruntime-web/dist/", document.baseURI).href;

const RESULTS = 24;
const [field, status, results] = ["query", "status", "results"].map((id) => document.getElementById(id));

async function fetched(file) {
  const response = await fetch(file);
  if (!response.ok) throw new Error(`${file} cannot be read (${response.status})`);
  return response;
}

// The numbers of the images with the largest cosines, best first.
function nearest(query, vectors, count) {
  const width = query.length;
  const scores = Float32Array.from({ length: count }, (_, row) => {
    let product = 0;
    let square = 0;
    for (let column = 0; column < width; column++) {
      const value = vectors[row * width + column];
      product += query[column] * value;
      square += value * value;
    }
    return product / Math.sqrt(square); // of a query of unit length
  });
  const best = Array.from(scores.keys()).sort((a, b) => scores[b] - scores[a]);
  return best.slice(0, RESULTS).map((row) => [row, scores[row]]);
}

function shown(row, score, caption) {
  const [element, figure, image, text] = ["li", "figure", "img", "figcaption"].map((tag) => document.createElement(tag));
  element.dataset.row = row;
  element.dataset.score = score;
  image.src = `index/${row}.webp`;
  image.alt = caption;
  text.textContent = `${score.toFixed(3)} ${caption}`;
  figure.append(image, text);
  element.append(figure);
  return element;
}

try {
  const tokenizer = await AutoTokenizer.from_pretrained("model");
  const model = await CLIPTextModelWithProjection.from_pretrained("model", { dtype: "q8" });
  const { width, captions } = await (await fetched("index/index.json")).json();
  const vectors = new Int8Array(await (await fetched("index/vectors.bin")).arrayBuffer());
  const expected = width * captions.length;
  if (vectors.length !== expected) {
    throw new Error(`index/vectors.bin has ${vectors.length} bytes instead of ${expected}; write or copy it again`);
  }
  async function search(text) {
    const start = performance.now();
    const { text_embeds } = await model(tokenizer([text.trim()], { truncation: true }));
    if (text_embeds.dims[1] !== width) throw new Error(`model/ has ${text_embeds.dims[1]} values, index/ ${width}`);
    const middle = performance.now();
    const found = nearest(text_embeds.data, vectors, captions.length);
    const times = [middle - start, performance.now() - middle].map((time) => time.toFixed(1));
    results.replaceChildren(...found.map(([row, score]) => shown(row, score, captions[row])));
    results.dataset.query = text;
    status.textContent = `${captions.length} images; the query took ${times[0]} ms, the search ${times[1]} ms.`;
  }
  let last = Promise.resolve();
  field.addEventListener("input", () => {
    const text = field.value;
    // One after the other; what has been typed over meanwhile is left out.
    last = last.then(() => (text === field.value && text.trim() ? search(text) : null)).catch(fail);
  });
  status.textContent = `${captions.length} images; type what you look for.`;
  field.disabled = false;
  field.focus();
} catch (error) {
  fail(error);
}

function fail(error) {
  status.textContent = error.message;
}
