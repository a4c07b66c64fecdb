// Held-out people under every stage of training, and where each stage stands between identity and compliance.
function render({ model, el }) {
  const { stages, cases } = model.get("data");
  let person = 0, chosen = stages.length - 1;
  for (let place = stages.length - 1; place >= 0 && stages[chosen].kind !== "stage"; place--) chosen = place;

  function choose(place) {
    chosen = place;
    update();
  }
  const people = chooser("person", "Person and prompt", (index) => {
    person = index;
    update();
  });
  const said = h("p", { class: "nm-status", "aria-live": "polite" });
  const large = h("div", { class: "nm-row nm-pair" });
  const plot = h("div", { class: "nm-frontier" });
  const list = h("div", { class: "nm-stages" });
  const root = h("div", { class: "nmlib-demo nm-identity", role: "group", "aria-label": "Identity explorer" },
    h("div", { class: "nm-head" }, people.field, h("span", { class: "nm-badge", title: "No model runs here." }, "recorded")),
    said, h("div", { class: "nm-body" }, large, plot), list);

  const numbers = (item) => `identity ${fixed(item.identity)}, compliance ${fixed(item.compliance)}`;
  function drawPlot(item) {
    const own = item.results[stages[chosen].name];
    const [xs, ys] = ["compliance", "identity"].map((key) => bounds([...stages.map((stage) => stage[key]), own[key]]));
    const { svg, x, y } = chart(xs, ys, "compliance", "identity", "Identity against compliance, a point for each stage");
    const at = stages[chosen];
    svg.append(h("line", { class: "nm-now", x1: x(at.compliance), y1: y(at.identity), x2: x(own.compliance), y2: y(own.identity) }),
      h("circle", { class: "nm-own", cx: x(own.compliance), cy: y(own.identity), r: 5 }));
    const points = stages.map((stage, place) => h("button", {
      type: "button", "data-key": `point-${stage.name}`, class: `nm-point nm-${stage.kind}`, "aria-pressed": String(place === chosen),
      style: `left:${(100 * x(stage.compliance)) / WIDE}%;top:${(100 * y(stage.identity)) / TALL}%`,
      title: stage.label, "aria-label": `${stage.label}: mean ${numbers(stage)}`, onclick: () => choose(place) }));
    plot.replaceChildren(h("div", { class: "nm-over" }, svg, points),
      h("p", { class: "nm-soft" }, "Points are means over all people: filled for stages, hollow for ablations. The ring is this picture."));
  }
  function draw() {
    const item = cases[person], stage = stages[chosen], own = item.results[stage.name];
    options(people.select, cases.map((one) => `${one.title}: ${one.prompt}`), person);
    said.replaceChildren(h("b", {}, stage.label), ` ${item.prompt}`);
    large.replaceChildren(
      h("figure", {}, picture(item.reference, `${item.title}, the picture that was given`), h("figcaption", {}, h("b", {}, item.title), h("span", { class: "nm-soft" }, "given"))),
      h("figure", { "data-stage": stage.name }, picture(own.image, `${stage.label}: ${item.prompt}, ${numbers(own)}`),
        h("figcaption", {}, h("b", {}, stage.label), h("span", { class: "nm-soft" }, numbers(own)))));
    drawPlot(item);
    list.replaceChildren(...["stage", "ablation"].map((kind) => {
      const shown = stages.map((one, place) => [one, place]).filter(([one]) => one.kind === kind);
      return shown.length ? h("fieldset", {}, h("legend", {}, kind === "stage" ? "Stages" : "Ablations"), h("div", { class: "nm-row" }, shown.map(([one, place]) =>
        h("button", { type: "button", "data-key": `stage-${one.name}`, "aria-pressed": String(place === chosen), onclick: () => choose(place),
          "aria-label": `${one.label}: ${numbers(item.results[one.name])}` },
        picture(item.results[one.name].image, ""), h("span", {}, one.label), h("span", { class: "nm-soft" }, `${fixed(item.results[one.name].identity)} / ${fixed(item.results[one.name].compliance)}`))))) : "";
    }));
  }
  const update = () => redraw(root, draw);
  el.append(root);
  update();
}

export default { render };
