/** A line at the top of the page that says what has happened, also across a move to another page. */

const KEPT = "loraplex-notice";

export function say(text) {
  document.getElementById("notice").textContent = text;
}

/** Take back what was said, unless something else has been said since. */
export function takeBack(text) {
  const place = document.getElementById("notice");
  if (place.textContent === text) place.textContent = "";
}

export function sayThen(text, address) {
  sessionStorage.setItem(KEPT, text);
  if (address === "reload") location.reload();
  else location.assign(address);
}

export function sayWhatWasKept() {
  const text = sessionStorage.getItem(KEPT);
  if (text === null) return;
  sessionStorage.removeItem(KEPT);
  // A moment later, so that the region is there before its text changes: only then is it read out.
  setTimeout(() => say(text), 50);
}
