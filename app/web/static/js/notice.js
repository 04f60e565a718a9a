/** A notice at the top of the page. It can also be shown on the page that is loaded next. */

const STORED = "loraplex-notice";

export function showNotice(text) {
  document.getElementById("notice").textContent = text;
}

/** Remove a notice, unless another one has replaced it. */
export function clearNotice(text) {
  const notice = document.getElementById("notice");
  if (notice.textContent === text) notice.textContent = "";
}

/** Load an address, or the same page for `reload`, and show the notice there. */
export function showAfterwards(text, address) {
  sessionStorage.setItem(STORED, text);
  if (address === "reload") location.reload();
  else location.assign(address);
}

export function showStored() {
  const text = sessionStorage.getItem(STORED);
  if (text === null) return;
  sessionStorage.removeItem(STORED);
  // After a pause, because screen readers announce a change of the region only if the region already exists.
  setTimeout(() => showNotice(text), 50);
}
