// Long conversations under several history policies: pictures of one round, curves over all rounds.
const SECONDS = 0.8;
const WORDS = { reencode: "through pixels", tokens: "tokens kept", prefix: "keys and values kept", oracle: "true history" };

function render({ model, el }) {
  const all = model.get("data").conversations;
  let chosen = 0, round = all[0].instructions.length - 1, timer = null;
  const talk = () => all[chosen], last = () => talk().instructions.length - 1, names = () => Object.keys(talk().policies);

  function go(to) {
    round = to;
    update();
  }
  function stop() {
    clearInterval(timer);
    timer = null;
    update();
  }
  function play() {
    if (timer !== null) return stop();
    if (round === last()) round = 0;
    timer = setInterval(() => (!root.isConnected || round >= last() ? stop() : go(round + 1)), 1000 * SECONDS);
    update();
  }

  const conversations = chooser("conversation", "Conversation", (index) => {
    chosen = index;
    go(Math.min(round, last()));
  });
  const slider = h("input", { type: "range", min: "0", "data-key": "round", "aria-label": "Round",
    oninput: () => go(Number(slider.value)), onkeydown: (event) => event.stopPropagation() });
  const player = button("play", "Play", play, { class: "nm-main nm-play" });
  const differ = h("input", { type: "checkbox", "data-key": "difference", onchange: () => update() });
  const said = h("p", { class: "nm-status", "aria-live": "polite" });
  const pictures = h("div", { class: "nm-row nm-pictures" });
  const charts = h("div", { class: "nm-charts" });
  const root = frame("drift", "Drift explorer",
    h("div", { class: "nm-head" }, conversations.field, h("span", { class: "nm-badge", title: "No model runs here." }, "recorded")),
    h("div", { class: "nm-controls" }, player, slider, h("label", { class: "nm-check" }, differ, "differences to the truth, × 3")),
    said, pictures, charts);

  function figure(name, uri, words, numbers) {
    const alt = `${words}, round ${round}${numbers ? `: ${numbers}` : ""}`, apart = differ.checked && name !== "truth";
    return h("figure", { "data-policy": name, class: `nm-policy nm-${name}` },
      h("div", { class: apart ? "nm-apart" : "" }, picture(uri, apart ? `${alt}, difference to the truth` : alt),
        apart && picture(talk().truth[round], "")),
      h("figcaption", {}, h("b", {}, words), h("span", { class: "nm-soft" }, numbers || "exact")));
  }
  function curve(value, title) {
    const lines = names().map((name) => [name, talk().policies[name].map(value)]).filter(([, values]) => values.every((v) => v !== null));
    if (!lines.length) return null;
    const { svg, x, y } = chart([0, last() || 1], bounds(lines.flatMap(([, values]) => values)), "round", title, `${title} of every policy by round`);
    svg.append(h("line", { class: "nm-now", x1: x(round), x2: x(round), y1: TOP, y2: TALL - BOTTOM }));
    for (const [name, values] of lines) {
      svg.append(h("path", { class: `nm-line nm-${name}`, d: values.map((v, place) => `${place ? "L" : "M"}${x(place)} ${y(v)}`).join("") }),
        h("circle", { class: `nm-dot nm-${name}`, cx: x(round), cy: y(values[round]), r: 4 }));
    }
    svg.addEventListener("click", (event) => {
      const box = svg.getBoundingClientRect(), at = ((event.clientX - box.left) / box.width) * WIDE;
      go(Math.max(0, Math.min(last(), Math.round(((at - LEFT) / (WIDE - LEFT - RIGHT)) * last()))));
    });
    return svg;
  }
  function draw() {
    options(conversations.select, all.map((item) => item.title), chosen);
    conversations.field.hidden = all.length < 2;
    [slider.max, slider.value] = [last(), round];
    slider.setAttribute("aria-valuetext", `round ${round}: ${talk().instructions[round]}`);
    player.textContent = timer === null ? "Play" : "Pause";
    said.replaceChildren(h("b", {}, `Round ${round}`), ` ${talk().instructions[round]}`);
    pictures.replaceChildren(figure("truth", talk().truth[round], "truth", ""), ...names().map((name) => {
      const frame = talk().policies[name][round];
      const numbers = `${fixed(frame.psnr, 1)} dB${frame.identity === null ? "" : `, identity ${fixed(frame.identity)}`}`;
      return figure(name, frame.image, WORDS[name] || name, numbers);
    }));
    charts.replaceChildren(...[curve((frame) => frame.identity, "identity"), curve((frame) => frame.psnr, "PSNR, dB")].filter(Boolean));
  }
  const update = () => redraw(root, draw);
  el.append(root);
  update();
  return () => clearInterval(timer);
}

export default { render };
