/** The chosen adapters: chips that can be removed, stored in the address. */

export class Chosen {
  #list;
  #most;
  #changed;

  constructor(list, { most, changed }) {
    this.#list = list;
    this.#most = most;
    this.#changed = changed;
    for (const item of list.children) this.#fill(item);
  }

  get references() {
    return [...this.#list.children].map((item) => item.dataset.reference);
  }

  /** Return whether there was room for it. */
  add(reference) {
    if (this.references.includes(reference)) return true;
    if (this.references.length >= this.#most) return false;
    const item = document.createElement("li");
    item.dataset.reference = reference;
    this.#fill(item);
    this.#list.append(item);
    this.#told();
    return true;
  }

  #fill(item) {
    const name = document.createElement("span");
    name.className = "wrap";
    name.textContent = item.dataset.reference;
    const away = document.createElement("button");
    away.type = "button";
    away.textContent = "×";
    away.setAttribute("aria-label", `Remove ${item.dataset.reference}`);
    away.addEventListener("click", () => {
      const next = (item.nextElementSibling || item.previousElementSibling)?.querySelector("button");
      item.remove();
      (next || document.getElementById("find")).focus();
      this.#told();
    });
    item.replaceChildren(name, away);
  }

  #told() {
    const asked = new URLSearchParams(this.references.map((reference) => ["adapter", reference]));
    history.replaceState(null, "", this.references.length ? `?${asked}` : location.pathname);
    this.#changed();
  }
}
