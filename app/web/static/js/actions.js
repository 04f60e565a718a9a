/** Buttons that change something: `data-opens` opens a dialog, `data-method` and `data-url` make a call. */
import { call, clearProblem, showProblem } from "./api.js";
import { sayThen } from "./notice.js";

document.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  if (button.dataset.opens) document.getElementById(button.dataset.opens).showModal();
  else if ("closes" in button.dataset) button.closest("dialog").close();
  else if (button.dataset.method) act(button);
});

async function act(button) {
  const { method, url, body, then, said, ifMatch } = button.dataset;
  const place = (button.closest("dialog") || document).querySelector("[data-problem]");
  clearProblem(place);
  button.disabled = true;
  try {
    const answer = await call(method, url, body, ifMatch ? { "If-Match": `"${ifMatch}"` } : {});
    sayThen(answer && answer.reverted ? reverted(answer) : said, then);
  } catch (error) {
    button.disabled = false;
    showProblem(place, error);
  }
}

function reverted({ reverted: back, skipped }) {
  const moved = back.map(({ name, to }) => (to === null ? `${name} has no live version now` : `${name} answers with version ${to} again`));
  const left = skipped.map(({ detail }) => detail);
  const some = [...moved, ...left].slice(0, 5);
  const more = moved.length + left.length - some.length;
  return `${some.join("; ")}${more > 0 ? `; and ${more} more` : ""}`;
}
