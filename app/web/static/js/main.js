/** Scripts of every page. */
import { say, sayWhatWasKept, takeBack } from "./notice.js";

sayWhatWasKept();

let trouble = "";

function complain(text) {
  trouble = text;
  say(text);
}

// A part of a page that cannot be refreshed stays as it was, with a message until a refresh succeeds.
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

// Text that cannot be the beginning of a name is not searched for.
document.addEventListener("htmx:beforeRequest", (event) => {
  const field = event.detail.elt;
  if ("checkValidity" in field && !field.checkValidity()) {
    event.preventDefault();
    field.reportValidity();
  }
});
