/** Buttons that change something: `data-opens` opens a dialog, `data-method` and `data-url` make a call. */
import { call, clearProblem, showProblem } from "./api.js";
import { showAfterwards } from "./notice.js";

document.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  if (button.dataset.opens) document.getElementById(button.dataset.opens).showModal();
  else if ("closes" in button.dataset) button.closest("dialog").close();
  else if (button.dataset.method) act(button);
});

async function act(button) {
  const { method, url, body, next, notice, ifMatch } = button.dataset;
  const output = (button.closest("dialog, [data-actions]") || document).querySelector("[data-problem]");
  clearProblem(output);
  button.disabled = true;
  try {
    const answer = await call(method, url, body, ifMatch ? { "If-Match": `"${ifMatch}"` } : {});
    // A call that makes a job leads to it.
    const address = answer && answer.id ? next.replace("{id}", encodeURIComponent(answer.id)) : next;
    showAfterwards(answer && answer.reverted ? describeRevert(answer) : notice, address);
  } catch (error) {
    button.disabled = false;
    showProblem(output, error);
  }
}

function describeRevert({ reverted, skipped }) {
  const moves = reverted.map(({ name, to }) => (to === null ? `${name} has no live version` : `version ${to} of ${name} is live again`));
  const parts = [...moves, ...skipped.map(({ detail }) => detail)];
  const shown = parts.slice(0, 5).join("; ");
  return parts.length > 5 ? `${shown}; and ${parts.length - 5} more` : shown;
}
