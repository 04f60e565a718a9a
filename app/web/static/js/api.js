/** The public JSON calls, and their errors (RFC 9457). */
import { sentence, withLabels } from "./wording.js";

export class Problem extends Error {
  constructor(status, members) {
    super(members.detail || members.title || `the service answered ${status}`);
    this.status = status;
    this.field = members.field || null;
    this.rows = Array.isArray(members.rows) ? members.rows : [];
  }
}

export function parseProblem(status, text) {
  try {
    return new Problem(status, JSON.parse(text));
  } catch {
    return new Problem(status, { detail: `The service answered with status ${status} and no reason.` });
  }
}

/** Make a call; resolve with the body of the answer (null if it is empty), reject with a Problem. */
export async function call(method, url, body, headers = {}) {
  const request = { method, headers: { Accept: "application/json", ...headers } };
  if (body !== undefined && body !== null) {
    request.body = typeof body === "string" ? body : JSON.stringify(body);
    request.headers["Content-Type"] = "application/json";
  }
  let answer;
  try {
    answer = await fetch(url, request);
  } catch {
    throw new Problem(0, { detail: "The service cannot be reached. Is it running?" });
  }
  const text = await answer.text();
  if (!answer.ok) throw parseProblem(answer.status, text);
  return text ? JSON.parse(text) : null;
}

/** Show a problem in `output`; in a form, mark and focus the input that it names. */
export function showProblem(output, error, form = null) {
  output.replaceChildren();
  const paragraph = document.createElement("p");
  const message = form ? withLabels(form, error.message) : error.message;
  paragraph.textContent = error.status === 412 ? "This has changed since the page was loaded. Reload the page and decide again." : sentence(message);
  output.append(paragraph);
  if (error.rows && error.rows.length) {
    const list = document.createElement("ul");
    for (const bad of error.rows.slice(0, 6)) {
      const item = document.createElement("li");
      item.textContent = `Row ${bad.row}${bad.column === null ? "" : `, ${bad.column}`}: ${bad.reason}`;
      list.append(item);
    }
    output.append(list);
  }
  const input = form && error.field ? inputOf(form, error.field) : null;
  if (input) {
    for (let details = input.closest("details"); details; details = details.parentElement.closest("details")) details.open = true;
    input.setAttribute("aria-invalid", "true");
    input.focus();
  }
}

export function clearProblem(output, form = null) {
  output.replaceChildren();
  if (form) for (const input of form.querySelectorAll("[aria-invalid]")) input.removeAttribute("aria-invalid");
}

/** The input for a field such as `training.epochs`, or for the nearest field that contains it. */
function inputOf(form, field) {
  const parts = field.split(".");
  for (; parts.length; parts.pop()) {
    const input = form.querySelector(`[data-field="${CSS.escape(parts.join("."))}"]`);
    if (input) return input;
  }
  return null;
}
