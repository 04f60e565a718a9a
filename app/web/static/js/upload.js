/** Upload of a dropped or chosen file as a data set. */
import { clearProblem, parseProblem, showProblem } from "./api.js";
import { showAfterwards } from "./notice.js";

const TYPES = {
  csv: "text/csv",
  jsonl: "application/x-ndjson",
  ndjson: "application/x-ndjson",
  parquet: "application/vnd.apache.parquet",
  arrow: "application/vnd.apache.arrow.stream",
  arrows: "application/vnd.apache.arrow.stream",
  npz: "application/x-npz",
};

const form = document.querySelector("[data-upload]");
const at = (name) => form.querySelector(`[data-${name}]`);
const input = form.querySelector("input[type=file]");
const problem = at("problem");
let file = null;
let request = null;

function choose(candidate) {
  clearProblem(problem, form);
  if (!candidate) return;
  if (!typeOf(candidate)) {
    showProblem(problem, { message: `${candidate.name} has an unknown file type; the name must end in ${Object.keys(TYPES).map((end) => `.${end}`).join(", ")}` });
    return;
  }
  file = candidate;
  at("file").textContent = `${file.name}, ${bytes(file.size)}`;
  form.elements.name.value = nameOf(file.name);
  at("ready").hidden = false;
  at("status").textContent = `Chosen file: ${file.name}`;
  form.elements.name.focus();
  form.elements.name.select();
}

function typeOf({ name }) {
  return TYPES[name.split(".").pop().toLowerCase()];
}

function nameOf(name) {
  return name.replace(/\.[^.]*$/, "").replace(/[^A-Za-z0-9._-]+/g, "-").replace(/^[^A-Za-z0-9]+/, "").slice(0, 128);
}

function bytes(number) {
  return number < 1024 ? `${number} bytes` : number < 2 ** 20 ? `${(number / 1024).toFixed(0)} KiB` : `${(number / 2 ** 20).toFixed(1)} MiB`;
}

function showProgress(isUploading) {
  at("uploading").hidden = !isUploading;
  at("ready").hidden = isUploading;
}

function send(name) {
  const bar = form.querySelector("progress");
  const label = form.querySelector("label[for=upload-progress]");
  clearProblem(problem, form);
  bar.value = 0;
  label.textContent = "Uploading";
  showProgress(true);
  at("status").textContent = "Uploading";
  // fetch does not report the progress of an upload.
  request = new XMLHttpRequest();
  request.open("PUT", `/datasets/${encodeURIComponent(name)}`);
  request.setRequestHeader("Content-Type", typeOf(file));
  request.upload.addEventListener("progress", (event) => {
    if (event.lengthComputable) bar.value = event.loaded / event.total;
  });
  request.upload.addEventListener("load", () => {
    bar.removeAttribute("value");
    label.textContent = "Reading";
    at("status").textContent = "Uploaded. The service is reading the file";
  });
  request.addEventListener("load", () => {
    const { status, responseText } = request;
    if (status === 200) showAfterwards(`${name} already has this content`, `/ui/datasets/${encodeURIComponent(name)}`);
    else if (status === 201) showAfterwards(`${name} was uploaded: ${JSON.parse(responseText).rows} rows`, `/ui/datasets/${encodeURIComponent(name)}`);
    else showRefusal(parseProblem(status, responseText));
  });
  request.addEventListener("error", () => showRefusal({ message: "The connection was lost during the upload. Try again" }));
  request.addEventListener("abort", () => {
    showProgress(false);
    at("status").textContent = "Cancelled. Nothing was stored";
    form.elements.name.focus();
  });
  request.send(file);
}

function showRefusal(error) {
  showProgress(false);
  at("status").textContent = "";
  showProblem(problem, error, form);
}

input.addEventListener("change", () => choose(input.files[0]));
at("cancel").addEventListener("click", () => request.abort());
form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (file) send(form.elements.name.value);
});
for (const kind of ["dragenter", "dragover"]) {
  form.addEventListener(kind, (event) => {
    event.preventDefault();
    form.classList.add("over");
  });
}
form.addEventListener("dragleave", (event) => {
  if (!form.contains(event.relatedTarget)) form.classList.remove("over");
});
form.addEventListener("drop", (event) => {
  event.preventDefault();
  form.classList.remove("over");
  choose(event.dataTransfer.files[0]);
});
