// The tree of a conversation. Live, the kernel answers; on a static page the recorded tree does.
const CELL = 70, THUMB = 52, EDGE = 9;

const pathOf = (nodes, id) => {
  const path = [];
  for (let at = id; at !== null; at = nodes[at].parent) path.unshift(nodes[at]);
  return path;
};

// "#3" as the model counts on a branch; later branches with a third picture have "#3b", "#3c".
function labelsOf(nodes) {
  const seen = {};
  return nodes.map((node) => {
    const number = pathOf(nodes, node.id).length;
    seen[number] = (seen[number] || 0) + 1;
    return `#${number}${seen[number] > 1 ? String.fromCharCode(96 + seen[number]) : ""}`;
  });
}

const originOf = (node) => (node.base === null ? node.parent : node.base);

// Columns are steps from the first picture, rows are lines of descent; the first child stays in its parent's row.
function placesOf(nodes) {
  const places = [];
  let rows = 0;
  const place = (node, column, row) => {
    places[node.id] = { column, row };
    nodes.filter((other) => originOf(other) === node.id)
      .forEach((child, number) => place(child, column + 1, number ? rows++ : row));
  };
  nodes.filter((node) => originOf(node) === null).forEach((root) => place(root, 0, rows++));
  return { places, rows, columns: 1 + Math.max(0, ...places.map((at) => at.column)) };
}

function render({ model, el }) {
  const live = () => model.get("live");
  const all = () => model.get("data").conversations;
  const pointers = all().map((state) => state.current);
  let chosen = model.get("chosen"), shown = pointers[chosen], note = "";
  const state = () => all()[chosen];
  const current = () => (live() ? state().current : pointers[chosen]);

  // ------------------------------------------------------------ what can be done
  function look(id) {
    [shown, note] = [id, ""];
    update();
  }
  function move(id, text) {
    [pointers[chosen], shown, note] = [id, id, text];
    update();
  }
  const answers = {
    undo: () => {
      const before = state().nodes[current()].parent;
      if (before === null) {
        note = "nothing to undo: this is the first picture of the session";
        return update();
      }
      move(before, `Undone. The current picture is ${labelsOf(state().nodes)[before]} again, bit for bit.`);
    },
    go_to: ({ id }) => move(id, `The current picture is ${labelsOf(state().nodes)[id]}.`),
    choose: ({ index }) => {
      [chosen, note] = [index, ""];
      look(pointers[index]);
    },
    branch: ({ child }) => {
      if (child !== undefined) return move(child, `Recorded answer: ${labelsOf(state().nodes)[child]}.`);
      note = "Nothing that was said to this picture is recorded. Look at another one, or open the notebook and say it.";
      update();
    },
  };
  function ask(message) {
    if (model.get("busy")) return;
    if (!live()) return answers[message.type](message);
    model.send(message);
    note = "Waiting for the kernel …";
    update();
  }
  function say() {
    const children = shown === null ? [] : state().nodes.filter((node) => node.parent === shown);
    if (!live()) return ask({ type: "branch", child: children[choices.select.selectedIndex]?.id });
    const text = words.value;
    ask(shown === current() ? { type: "say", text } : { type: "branch", id: shown, text });
  }

  // ------------------------------------------------------------ what stands still
  const conversations = chooser("conversation", "Conversation", (index) => ask({ type: "choose", index }));
  const badge = h("span", { class: "nm-badge" });
  const large = h("div", { class: "nm-large" });
  const others = h("div", { class: "nm-others" });
  const attention = h("div", { class: "nm-attention" });
  const tree = h("div", { class: "nm-tree", role: "group", "aria-label": "Tree of pictures", tabindex: "-1" });
  const transcript = h("ol", { class: "nm-transcript", "aria-label": "Transcript up to the shown picture", tabindex: "0" });
  const words = h("input", { type: "text", "data-key": "words", autocomplete: "off", placeholder: "type what to change",
    onkeydown: (event) => { event.stopPropagation(); if (event.key === "Enter") say(); } });
  const typed = h("label", { class: "nm-field" }, h("span", {}, "Say"), words);
  const choices = chooser("choices", "", (index) => { if (live() && index) words.value = choices.select.value; });
  const speak = button("say", "Say", say, { class: "nm-main" });
  const goTo = button("go_to", "Go to", () => ask({ type: "go_to", id: shown }));
  const undo = button("undo", "Undo", () => ask({ type: "undo" }));
  const status = h("p", { class: "nm-status", role: "status", "aria-live": "polite" });
  const meter = h("progress", { class: "nm-meter", "aria-label": "Steps of this request", hidden: true });
  const root = frame("conversation", "Conversation explorer",
    h("div", { class: "nm-head" }, conversations.field, badge),
    h("div", { class: "nm-body" },
      h("div", { class: "nm-left" }, large, attention, others),
      h("div", { class: "nm-side" }, tree,
        h("div", { class: "nm-controls" }, typed, choices.field, speak, goTo, undo), status, meter, transcript)));

  // ------------------------------------------------------------ what changes
  function drawLarge(node, label) {
    const now = node.id === current();
    large.replaceChildren(
      picture(node.image, `Picture ${label}: ${node.instruction}`),
      h("p", {}, h("strong", {}, label, now ? " (current)" : ""), ` ${node.instruction}`),
      h("p", { class: "nm-soft" }, node.reply ? `The model says: ${node.reply}` : node.parent === null ? "The first picture." : "The model says nothing."));
  }
  function drawAttention(node, path, labels) {
    const most = Math.max(...node.attention, 1e-9), whole = node.attention.reduce((sum, share) => sum + share, 0) || 1;
    const bars = node.attention.map((share, place) => h("li", {},
      h("span", { class: "nm-bar" }, h("span", { style: `height:${(100 * share) / most}%` })),
      picture(path[place].image, ""), h("span", {}, labels[path[place].id]),
      h("span", { class: "nm-soft" }, `${((100 * share) / whole).toFixed(0)} %`)));
    attention.replaceChildren(h("h4", {}, "Attention to earlier pictures"),
      bars.length ? h("ol", { tabindex: "0", "aria-label": "Share of each earlier picture" }, bars) : h("p", { class: "nm-soft" }, "There is none to attend to."),
      h("p", { class: "nm-soft nm-note" }, bars.length ? `${(100 * whole).toFixed(1)} % of all its attention; the rest goes to words and to itself.` : ""));
  }
  function drawOthers(node) {
    const names = Object.keys(node.alternatives);
    others.replaceChildren(h("h4", {}, "Others, asked the same"),
      names.length ? h("div", { class: "nm-row" }, names.map((name) =>
        h("figure", {}, picture(node.alternatives[name], `${name}: ${node.instruction}`), h("figcaption", {}, name))))
        : h("p", { class: "nm-soft" }, node.parent === null ? "This picture was not asked for." : "There are none to compare."));
  }
  function drawTree(nodes, labels) {
    const { places, rows, columns } = placesOf(nodes), onPath = new Set(pathOf(nodes, current()).map((node) => node.id));
    const [left, top] = [(id) => places[id].column * CELL, (id) => places[id].row * (CELL + 8)];
    const edges = nodes.filter((node) => originOf(node) !== null).map((node) => {
      const from = originOf(node), [x, y] = [left(from) + EDGE + THUMB, top(from) + EDGE + THUMB / 2];
      const [toX, toY] = [left(node.id) + EDGE, top(node.id) + EDGE + THUMB / 2], middle = x + (toX - x) / 2;
      return h("path", { d: `M${x} ${y}H${middle}V${toY}H${toX}`, class: from === node.parent ? "" : "nm-back" });
    });
    const states = nodes.map((node) => h("button", {
      type: "button", "data-key": `state-${node.id}`, style: `left:${left(node.id)}px;top:${top(node.id)}px`,
      class: onPath.has(node.id) ? "" : "nm-off", "aria-pressed": String(node.id === shown),
      "aria-current": node.id === current() ? "true" : false, title: node.instruction,
      "aria-label": `Picture ${labels[node.id]}: ${node.instruction}${originOf(node) === null ? "" : `, from ${labels[originOf(node)]}`}`,
      onclick: () => look(node.id) }, picture(node.image, ""), h("span", {}, labels[node.id])));
    const box = h("div", { style: `width:${columns * CELL}px;height:${rows * (CELL + 8)}px` },
      h("svg", { width: columns * CELL, height: rows * (CELL + 8), "aria-hidden": "true" }, edges), states);
    tree.replaceChildren(box);
  }
  function drawWords(nodes, labels) {
    const here = shown === null || shown === current();
    typed.hidden = !live();
    const children = nodes.filter((node) => node.parent === shown);
    if (live()) options(choices.select, ["or choose a sentence", ...state().suggestions], 0);
    else options(choices.select, children.length ? children.map((node) => node.instruction) : ["nothing recorded"], 0);
    const label = live() ? "Suggestions" : `What was said to ${labels[shown]}`;
    choices.field.firstChild.textContent = label;
    choices.select.setAttribute("aria-label", label);
    speak.textContent = here ? "Say" : "Branch";
    speak.setAttribute("aria-label", here ? "Say it to the current picture" : `Branch from ${labels[shown]}`);
    goTo.setAttribute("aria-disabled", String(here));
  }
  function draw() {
    const { nodes } = state(), labels = labelsOf(nodes), busy = model.get("busy");
    options(conversations.select, all().map((item) => item.title), chosen);
    conversations.field.hidden = all().length < 2;
    badge.textContent = live() ? "live" : "recorded";
    badge.title = live() ? "A model answers." : "The answers were recorded when this page was made; no model runs.";
    if (shown !== null) {
      const path = pathOf(nodes, shown);
      drawLarge(nodes[shown], labels[shown]);
      drawAttention(nodes[shown], path, labels);
      drawOthers(nodes[shown]);
      drawTree(nodes, labels);
      transcript.replaceChildren(...path.map((node) => h("li", { "aria-current": node.id === shown ? "true" : false },
        h("b", {}, labels[node.id]), h("span", {}, node.instruction, node.reply ? h("i", {}, node.reply) : null))));
      transcript.scrollTop = transcript.scrollHeight;
    }
    drawWords(nodes, labels);
    root.setAttribute("aria-busy", String(Boolean(busy)));
    const error = model.get("message");
    status.className = `nm-status${error ? " nm-error" : ""}`;
    const rest = live() ? "A model answers: say something, or look at any picture." : "Recorded: the answers were made with this page; no model runs here.";
    const { what, done, steps } = model.get("progress");
    const at = what ? `${what} (step ${done + 1} of ${steps}) …` : "Working …";
    status.textContent = busy ? at : error || note || rest;
    meter.hidden = !(busy && steps);
    if (steps) [meter.max, meter.value] = [steps, done];
  }
  const update = () => redraw(root, draw);
  function heard() {
    const moved = chosen !== model.get("chosen") || pointers[chosen] !== state().current || state().nodes.length !== count;
    chosen = model.get("chosen");
    [pointers[chosen], count] = [state().current, state().nodes.length];
    if (moved) [shown, words.value, note] = [state().current, "", ""];
    update();
  }
  function answered() {
    note = "";
    update();
  }
  let count = state().nodes.length;
  const events = { "change:data": heard, "change:chosen": heard, "change:busy": answered, "change:progress": update,
    "change:message": update };
  for (const [event, call] of Object.entries(events)) model.on(event, call);
  el.append(root);
  update();
  return () => Object.entries(events).forEach(([event, call]) => model.off(event, call));
}

export default { render };
