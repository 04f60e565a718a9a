/** An 8 × 8 drawing of values from 0 to 16, by pointer or keyboard. */

const SIDE = 8;
const FULL = 16;
const MOVES = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };

export class Drawing {
  #canvas;
  #onChange;
  #onMove;
  #cells = new Array(SIDE * SIDE).fill(0);
  #cursor = [0, 0];
  #last = null;

  /** `onChange()` follows each change by the user; `onMove(text)` describes the cell of the keyboard cursor. */
  constructor(canvas, { onChange, onMove }) {
    this.#canvas = canvas;
    this.#onChange = onChange;
    this.#onMove = onMove;
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      this.#ink(event);
    });
    canvas.addEventListener("pointermove", (event) => event.buttons && this.#ink(event));
    canvas.addEventListener("pointerup", () => (this.#last = null));
    canvas.addEventListener("keydown", (event) => this.#press(event));
    for (const kind of ["focus", "blur"]) canvas.addEventListener(kind, () => this.#paint());
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.#paint());
    this.#paint();
  }

  get values() {
    return [...this.#cells];
  }

  set values(cells) {
    this.show(cells);
    this.#onChange();
  }

  /** Show values without a call of `onChange`; values outside 0 to 16 are clipped. */
  show(cells) {
    this.#cells = cells.map((value) => Math.min(FULL, Math.max(0, value)));
    this.#paint();
  }

  get isEmpty() {
    return this.#cells.every((value) => value === 0);
  }

  clear() {
    this.values = new Array(SIDE * SIDE).fill(0);
  }

  /** A round brush: full ink under the pointer, fading within a cell. Strokes have no gaps. */
  #ink({ offsetX, offsetY }) {
    const cell = this.#canvas.clientWidth / SIDE;
    const to = [offsetX / cell, offsetY / cell];
    const from = this.#last || to;
    const steps = Math.max(1, Math.ceil(4 * Math.hypot(to[0] - from[0], to[1] - from[1])));
    for (let step = 1; step <= steps; step += 1) {
      const x = from[0] + ((to[0] - from[0]) * step) / steps;
      const y = from[1] + ((to[1] - from[1]) * step) / steps;
      this.#cells = this.#cells.map((value, index) => {
        const distance = Math.hypot(x - (index % SIDE) - 0.5, y - Math.floor(index / SIDE) - 0.5);
        return Math.max(value, Math.round(FULL * Math.min(1, Math.max(0, 1.35 - distance))));
      });
    }
    this.#last = to;
    this.#paint();
    this.#onChange();
  }

  #press(event) {
    const [row, column] = this.#cursor;
    const index = row * SIDE + column;
    if (event.key in MOVES) {
      const [down, right] = MOVES[event.key];
      this.#cursor = [Math.min(SIDE - 1, Math.max(0, row + down)), Math.min(SIDE - 1, Math.max(0, column + right))];
    } else if (event.key === " ") {
      this.#cells[index] = FULL;
      this.#onChange();
    } else if (event.key === "Backspace" || event.key === "Delete") {
      this.#cells[index] = 0;
      this.#onChange();
    } else {
      return;
    }
    event.preventDefault();
    this.#paint();
    const [down, right] = this.#cursor;
    this.#onMove(`Row ${down + 1}, column ${right + 1}: ${this.#cells[down * SIDE + right]} of ${FULL}`);
  }

  #paint() {
    const canvas = this.#canvas;
    const style = getComputedStyle(canvas);
    const pen = canvas.getContext("2d");
    const cell = canvas.width / SIDE;
    pen.clearRect(0, 0, canvas.width, canvas.height);
    for (let index = 0; index < SIDE * SIDE; index += 1) {
      const [x, y] = [(index % SIDE) * cell, Math.floor(index / SIDE) * cell];
      pen.globalAlpha = this.#cells[index] / FULL;
      pen.fillStyle = style.getPropertyValue("--text");
      pen.fillRect(x, y, cell, cell);
      pen.globalAlpha = 1;
      pen.strokeStyle = style.getPropertyValue("--line");
      pen.strokeRect(x + 0.5, y + 0.5, cell, cell);
    }
    if (document.activeElement === canvas) {
      pen.strokeStyle = style.getPropertyValue("--second-fill");
      pen.lineWidth = 3;
      pen.strokeRect(this.#cursor[1] * cell + 2, this.#cursor[0] * cell + 2, cell - 4, cell - 4);
      pen.lineWidth = 1;
    }
    const filled = this.#cells.filter(Boolean).length;
    canvas.setAttribute("aria-label", `Drawing of 8 by 8 cells, ${filled ? `${filled} of them filled` : "empty"}`);
  }
}
