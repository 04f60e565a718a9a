/** Texts of errors as sentences, with the labels of a form in place of field names. */

/** The same list is in app/web/pages/formatting.py. Other words may be names of adapters, data sets or columns. */
const CAPITALISED = new Set("a an at each every it its no none one only the there they this which".split(" "));

export function sentence(text) {
  const capitalised = CAPITALISED.has(text.split(" ", 1)[0]) ? text.charAt(0).toUpperCase() + text.slice(1) : text;
  return /[.!?]$/.test(capitalised) ? capitalised : `${capitalised}.`;
}

/** Replace the path of each field of the form: `training.epochs: …` → `Epochs: …`. */
export function withLabels(form, text) {
  const inputs = [...form.querySelectorAll("[data-field]")].sort((one, other) => other.dataset.field.length - one.dataset.field.length);
  return inputs.reduce((result, input) => result.replace(pathOf(input.dataset.field), labelOf(input)), text);
}

/** Return a pattern for a path as a word of its own; a path without a dot matches only at the beginning. */
function pathOf(field) {
  const path = field.replaceAll(".", "\\.");
  return new RegExp(field.includes(".") ? `(?<![\\w.])${path}(?![\\w.]*\\w)` : `^${path}(?=[ :,])`, "g");
}

function labelOf(input) {
  const label = input.dataset.label ?? input.labels[0]?.textContent.trim() ?? input.dataset.field;
  return () => label;
}
