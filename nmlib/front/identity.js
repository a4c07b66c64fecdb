// Held-out people under every stage of training, and where each stage stands between identity and compliance.
const LEGENDS = { stage: "Stages", ablation: "Ablations" };

function render({ model, el }) {
  const { stages: given, cases } = model.get("data");
  const kinds = Object.keys(LEGENDS).filter((kind) => given.some((stage) => stage.kind === kind));
  const stages = kinds.flatMap((kind) => given.filter((stage) => stage.kind === kind));
  const who = (one) => one.title + one.reference;  // two people may have one name
  const people = cases.filter((one, place) => cases.findIndex((other) => who(other) === who(one)) === place);
  const prompts = () => cases.filter((one) => who(one) === who(people[person]));
  let person = 0, prompt = 0, chosen = Math.max(0, stages.filter((stage) => stage.kind === "stage").length - 1);

  function choose(place) {
    chosen = place;
    update();
  }
  const persons = chooser("person", "Person", (index) => {
    [person, prompt] = [index, 0];
    update();
  });
  const asked = chooser("prompt", "Prompt", (index) => {
    prompt = index;
    update();
  });
  const said = h("p", { class: "nm-status", "aria-live": "polite" });
  const large = h("div", { class: "nm-row nm-pair" });
  const plot = h("div", { class: "nm-frontier" });
  const list = h("div", { class: "nm-stages" });
  const root = frame("identity", "Identity explorer",
    h("div", { class: "nm-head" }, persons.field, asked.field, h("span", { class: "nm-badge", title: "No model runs here." }, "recorded")),
    said, h("div", { class: "nm-body" }, large, plot), list);

  const numbers = (item) => `identity ${fixed(item.identity)}, compliance ${fixed(item.compliance)}`;
  const stop = (place) => (place === chosen ? "0" : "-1");
  function drawPlot(item) {
    const own = item.results[stages[chosen].name], at = stages[chosen];
    const [xs, ys] = ["compliance", "identity"].map((key) => bounds([...stages.map((stage) => stage[key]), own[key]]));
    const { svg, x, y } = chart(xs, ys, "compliance", "identity", "Identity against compliance, a point for each stage");
    const [left, top] = [x(at.compliance), y(at.identity)], side = left > WIDE / 2 ? -1 : 1;
    svg.append(h("line", { class: "nm-now", x1: left, y1: top, x2: x(own.compliance), y2: y(own.identity) }),
      h("circle", { class: "nm-own", cx: x(own.compliance), cy: y(own.identity), r: 5 }),
      h("text", { class: "nm-title", x: left + 10 * side, y: Math.max(TOP + 22, top - 6), "text-anchor": side < 0 ? "end" : "start" }, at.label));
    const points = stages.map((stage, place) => h("button", {
      type: "button", "data-key": `point-${stage.name}`, class: `nm-point nm-${stage.kind}`, "aria-pressed": String(place === chosen),
      style: `left:${(100 * x(stage.compliance)) / WIDE}%;top:${(100 * y(stage.identity)) / TALL}%`, tabindex: stop(place),
      title: stage.label, "aria-label": `${stage.label}: mean ${numbers(stage)}`, onclick: () => choose(place) }));
    plot.replaceChildren(h("div", { class: "nm-over" }, svg, points),
      h("p", { class: "nm-soft" }, "Points are means over all people: filled for stages, hollow for ablations. The ring is this picture."));
  }
  function stageButton(stage, place, result) {
    return h("button", { type: "button", "data-key": `stage-${stage.name}`, "aria-pressed": String(place === chosen), tabindex: stop(place),
      "aria-label": `${stage.label}: ${numbers(result)}`, onclick: () => choose(place) },
    picture(result.image, ""), h("span", {}, stage.label), h("span", { class: "nm-soft" }, `${fixed(result.identity)} / ${fixed(result.compliance)}`));
  }
  function drawList(item) {
    list.replaceChildren(...kinds.map((kind) => h("fieldset", {}, h("legend", {}, LEGENDS[kind]), h("div", { class: "nm-row" },
      stages.map((stage, place) => stage.kind === kind && stageButton(stage, place, item.results[stage.name]))))));
  }
  function draw() {
    const item = prompts()[prompt], stage = stages[chosen], own = item.results[stage.name];
    options(persons.select, people.map((one) => one.title), person);
    options(asked.select, prompts().map((one) => one.prompt), prompt);
    said.replaceChildren(h("b", {}, stage.label), ` ${item.prompt}`);
    large.replaceChildren(
      h("figure", {}, picture(item.reference, `${item.title}, the picture that was given`), h("figcaption", {}, h("b", {}, item.title), h("span", { class: "nm-soft" }, "given"))),
      h("figure", { "data-stage": stage.name }, picture(own.image, `${stage.label}: ${item.prompt}, ${numbers(own)}`),
        h("figcaption", {}, h("b", {}, stage.label), h("span", { class: "nm-soft" }, numbers(own)))));
    drawPlot(item);
    drawList(item);
    for (const group of [plot, list]) roving(group, stages.length, chosen, choose);
  }
  const update = () => redraw(root, draw);
  el.append(root);
  update();
}

export default { render };
