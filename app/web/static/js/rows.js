/** Parser of pasted numbers. */

/** Convert text to numbers; throw an Error that describes the mistake. */
export function readNumbers(text, width) {
  const numbers = text.trim().startsWith("[") ? fromJson(text) : text.split(/[\s,;]+/).filter(Boolean).map((word) => finite(Number(word), word));
  if (numbers.length !== width) throw new Error(`There are ${numbers.length} numbers, and the layer takes ${width}.`);
  return numbers;
}

function fromJson(text) {
  let value;
  try {
    value = JSON.parse(text);
  } catch {
    throw new Error("This is not a valid JSON array. Look for a missing bracket or comma.");
  }
  // A list of one row counts as the row.
  if (Array.isArray(value) && value.length === 1 && Array.isArray(value[0])) [value] = value;
  return value.map((number) => finite(number));
}

function finite(number, text = number) {
  if (!Number.isFinite(number)) throw new Error(`${JSON.stringify(text)} is not a number.`);
  return number;
}
