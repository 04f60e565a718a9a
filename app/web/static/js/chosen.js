/** The chosen adapters: a list of removable chips, which the URL of the page stores. */

export class Chosen {
  #list;
  #maxAdapters;
  #onChange;

  constructor(list, { maxAdapters, onChange }) {
    this.#list = list;
    this.#maxAdapters = maxAdapters;
    this.#onChange = onChange;
    for (const item of list.children) this.#fill(item);
  }

  get references() {
    return [...this.#list.children].map((item) => item.dataset.reference);
  }

  /** Add an adapter; return false if there are too many. */
  add(reference) {
    if (this.references.includes(reference)) return true;
    if (this.references.length >= this.#maxAdapters) return false;
    const item = document.createElement("li");
    item.dataset.reference = reference;
    this.#fill(item);
    this.#list.append(item);
    this.#save();
    return true;
  }

  #fill(item) {
    const name = document.createElement("span");
    name.className = "wrap";
    name.textContent = item.dataset.reference;
    const remove = document.createElement("button");
    remove.type = "button";
    remove.textContent = "×";
    remove.setAttribute("aria-label", `Remove ${item.dataset.reference}`);
    remove.addEventListener("click", () => {
      const neighbour = (item.nextElementSibling || item.previousElementSibling)?.querySelector("button");
      item.remove();
      (neighbour || document.getElementById("find")).focus();
      this.#save();
    });
    item.replaceChildren(name, remove);
  }

  #save() {
    const query = new URLSearchParams(this.references.map((reference) => ["adapter", reference]));
    history.replaceState(null, "", this.references.length ? `?${query}` : location.pathname);
    this.#onChange();
  }
}
