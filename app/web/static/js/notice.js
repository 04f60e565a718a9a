/** A notice at the top of the page, which is also shown after a move to another page. */

const KEPT = "loraplex-notice";

export function say(text) {
  document.getElementById("notice").textContent = text;
}

/** Remove a notice, unless another one has replaced it. */
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
  // Later, so that the region exists before its text changes: only then do screen readers read it out.
  setTimeout(() => say(text), 50);
}
