/** Scripts of every page. */
import { clearNotice, showNotice, showStored } from "./notice.js";

showStored();

let complaint = "";

function complain(text) {
  complaint = text;
  showNotice(text);
}

// A part of a page that cannot be refreshed stays as it was, with a message until a refresh succeeds.
document.addEventListener("htmx:responseError", (event) => {
  const status = event.detail.xhr.status;
  const field = event.detail.elt;
  if (status === 422 && "setCustomValidity" in field) return;
  complain(`The page could not be refreshed (status ${status}).`);
});
document.addEventListener("htmx:sendError", () => complain("The service cannot be reached. Is it running?"));
document.addEventListener("htmx:afterRequest", (event) => {
  if (event.detail.successful) clearNotice(complaint);
});

// A search for text that no name can begin with is not sent.
document.addEventListener("htmx:beforeRequest", (event) => {
  const field = event.detail.elt;
  if ("checkValidity" in field && !field.checkValidity()) {
    event.preventDefault();
    field.reportValidity();
  }
});
