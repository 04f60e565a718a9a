/** The form that opens a session with a key. */
import { call, clearProblem, showProblem } from "./api.js";

const form = document.getElementById("sign-in");
const output = form?.querySelector("[data-problem]");

form?.addEventListener("submit", async (event) => {
  event.preventDefault();
  clearProblem(output, form);
  const button = form.querySelector("button");
  button.disabled = true;
  try {
    await call("POST", "/session", { key: form.elements.key.value.trim() });
    // The form may be shown in place of any page, which is then loaded again.
    if (location.pathname === "/ui/sign-in") location.assign("/");
    else location.reload();
  } catch (error) {
    showProblem(output, error, form);
  } finally {
    button.disabled = false;
  }
});
