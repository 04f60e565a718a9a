/** Numbers out of what somebody pasted. */

/** Text → numbers; throws an Error that says what is wrong. */
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
    throw new Error("It begins as a JSON array and is none: look for a bracket or a comma that is missing.");
  }
  // One row in a list of rows is a row.
  if (Array.isArray(value) && value.length === 1 && Array.isArray(value[0])) [value] = value;
  return value.map((number) => finite(number));
}

function finite(number, given = number) {
  if (!Number.isFinite(number)) throw new Error(`${JSON.stringify(given)} is not a number.`);
  return number;
}
