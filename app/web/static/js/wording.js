/** Text of an error: a sentence that names the fields of a form by their labels. */

/** The same list is in app/web/pages/formatting.py. Other words may be names of adapters, data sets or columns. */
const CAPITALISED = new Set("a an at each every it its no none one only the there they this which".split(" "));

export function sentence(text) {
  const whole = CAPITALISED.has(text.split(" ", 1)[0]) ? text.charAt(0).toUpperCase() + text.slice(1) : text;
  return /[.!?]$/.test(whole) ? whole : `${whole}.`;
}

/** `training.epochs: …` → `Epochs: …`, for every field that the form has. */
export function inWordsOf(form, text) {
  const inputs = [...form.querySelectorAll("[data-field]")].sort((one, other) => other.dataset.field.length - one.dataset.field.length);
  return inputs.reduce((words, input) => words.replace(pathOf(input.dataset.field), labelOf(input)), text);
}

/** A field's path as a separate word. A path without a dot counts as a field only at the beginning. */
function pathOf(field) {
  const path = field.replaceAll(".", "\\.");
  return new RegExp(field.includes(".") ? `(?<![\\w.])${path}(?![\\w.]*\\w)` : `^${path}(?=[ :,])`, "g");
}

function labelOf(input) {
  const label = input.dataset.label ?? input.labels[0]?.textContent.trim() ?? input.dataset.field;
  return () => label;
}
