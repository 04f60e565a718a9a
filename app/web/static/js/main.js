/** On every page. */
import { say, sayWhatWasKept, takeBack } from "./notice.js";

sayWhatWasKept();

let trouble = "";

function complain(text) {
  trouble = text;
  say(text);
}

// A part of a page that could not be had stays as it was, and says so until one can be had again.
document.addEventListener("htmx:responseError", (event) => {
  const status = event.detail.xhr.status;
  const field = event.detail.elt;
  if (status === 422 && "setCustomValidity" in field) return;
  complain(`This could not be refreshed (status ${status}).`);
});
document.addEventListener("htmx:sendError", () => complain("The service cannot be reached. Is it running?"));
document.addEventListener("htmx:afterRequest", (event) => {
  if (event.detail.successful) takeBack(trouble);
});

// Words that no name begins with are not asked for.
document.addEventListener("htmx:beforeRequest", (event) => {
  const field = event.detail.elt;
  if ("checkValidity" in field && !field.checkValidity()) {
    event.preventDefault();
    field.reportValidity();
  }
});
