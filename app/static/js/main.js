/** On every page. */
import { say, sayWhatWasKept } from "./notice.js";

sayWhatWasKept();

// A part of a page that could not be had stays as it was, and says so.
document.addEventListener("htmx:responseError", (event) => {
  const status = event.detail.xhr.status;
  const field = event.detail.elt;
  if (status === 422 && "setCustomValidity" in field) return;
  say(`This could not be refreshed (status ${status}).`);
});
document.addEventListener("htmx:sendError", () => say("The service cannot be reached. Is it running?"));

// Words that no name begins with are not asked for.
document.addEventListener("htmx:beforeRequest", (event) => {
  const field = event.detail.elt;
  if ("checkValidity" in field && !field.checkValidity()) {
    event.preventDefault();
    field.reportValidity();
  }
});
