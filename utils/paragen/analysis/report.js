// Behaviour of the report's page: sorts and filters its tables, opens collections, draws pictures when they come into view.
"use strict";
(() => {
  const drawn = new Map(); // element -> kind, of the pictures that are there
  const symbols = ["circle", "square", "diamond", "triangle-up", "x", "star", "triangle-down", "pentagon"];
  const colours = 7;
  const all = (selector, top = document) => [...top.querySelectorAll(selector)];
  const json = (id) => JSON.parse(document.getElementById("data-" + id).textContent);
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();

  // ---- tables
  function sortBy(header, up = header.getAttribute("aria-sort") !== "ascending") {
    const table = header.closest("table");
    const place = [...header.parentNode.children].indexOf(header);
    const numbers = header.dataset.kind === "number";
    const value = (row) => {
      const cell = row.children[place];
      const text = cell.dataset.v ?? cell.textContent.trim();
      return numbers && text !== "" ? Number(text) : text;
    };
    const order = new Intl.Collator("en", { numeric: true });
    const rows = all("tbody tr", table).map((row) => [value(row), row]);
    rows.sort(([a], [b]) => {
      if (a === "" || b === "") return (a === "") - (b === ""); // what is not known comes last either way
      return (up ? 1 : -1) * (numbers ? a - b : order.compare(a, b));
    });
    all("thead th", table).forEach((other) => other.setAttribute("aria-sort", "none"));
    header.setAttribute("aria-sort", up ? "ascending" : "descending");
    table.tBodies[0].append(...rows.map(([, row]) => row));
    sorter(table.id).value = place;
  }

  function turn(id) {
    const sorted = document.querySelector(`#${id} thead [aria-sort]:not([aria-sort=none])`);
    sortBy(sorted ?? document.querySelector(`#${id} thead th`));
  }

  const sorter = (id) => document.querySelector(`select[data-sort=${id}]`); // for columns that a small screen folds
  function fillSorter(select) {
    const heads = all("thead th", document.getElementById(select.dataset.sort));
    select.append(new Option("…", ""), ...heads.map((head, place) => new Option(head.textContent.trim(), place)));
    select.options[0].disabled = true;
  }

  // What is typed into a filter: the numbers behind `rank` and behind `seed`, and the other words.
  function termsOf(typed) {
    const terms = { rank: [], seed: [], words: [] };
    let key = null;
    for (const word of typed.toLowerCase().split(/[\s=:,]+/).filter(Boolean)) {
      const keyed = /^(rank|seed)s?[-_]?([0-9]*)$/.exec(word);
      const number = keyed ? keyed[2] : /^[0-9]+$/.test(word) && word;
      key = keyed ? keyed[1] : number ? key : null;
      if (key && number) terms[key].push(String(Number(number)));
      else if (!key) terms.words.push(word);
    }
    return terms;
  }

  // Whether a row fits: a number is a whole rank, seed or word of its names, another word a part of them.
  function fits(row, { rank, seed, words }) {
    const text = row.dataset.text.toLowerCase();
    const whole = [row.dataset.rank, row.dataset.seed, ...text.split(/\s+/)];
    return words.every((word) => (/^[0-9]+$/.test(word) ? whole.includes(word) : text.includes(word)))
      && (!seed.length || seed.includes(row.dataset.seed))
      && (!rank.length || row.dataset.rank === undefined || rank.includes(row.dataset.rank));
  }

  function filter(id) {
    const table = document.getElementById(id);
    const terms = termsOf(document.querySelector(`input[data-for=${id}]`).value);
    const state = document.querySelector(`select[data-for=${id}]`)?.value;
    const rows = all("tbody tr", table);
    const columns = all("th[data-rank]", table); // where a rank is a column, it is the columns that are filtered
    const isOut = (column) => terms.rank.length > 0 && !terms.rank.includes(column.dataset.rank);
    const isEmpty = columns.length > 0 && columns.every(isOut);
    for (const row of rows) row.hidden = isEmpty || !fits(row, terms) || Boolean(state && row.dataset.state !== state);
    for (const column of columns) {
      const place = [...column.parentNode.children].indexOf(column);
      for (const row of table.rows) row.children[place].hidden = !isEmpty && isOut(column);
    }
    const left = rows.filter((row) => !row.hidden).length;
    document.querySelector(`.count[data-for=${id}]`).textContent = `${left} of ${rows.length}`;
    document.querySelector(`.hint[data-for=${id}]`).hidden = left > 0;
  }

  function clear(id) {
    const box = document.querySelector(`input[data-for=${id}]`);
    box.value = "";
    all(`select[data-for=${id}]`).forEach((select) => { select.value = ""; });
    filter(id);
    return box;
  }

  // ---- opening a collection
  function open(id) {
    let article = document.getElementById("article-" + id);
    if (!article) {
      article = document.getElementById("collection-" + id).content.firstElementChild.cloneNode(true);
      article.id = "article-" + id;
      document.getElementById("opened").prepend(article);
      all(".plot", article).forEach((element) => coming.observe(element));
    }
    mark(id, true);
    article.scrollIntoView({ block: "start" });
    article.querySelector("h3").focus({ preventScroll: true });
  }

  function close(id) {
    const article = document.getElementById("article-" + id);
    all(".plot", article).forEach((element) => {
      coming.unobserve(element);
      if (drawn.delete(element)) Plotly.purge(element);
    });
    article.remove();
    mark(id, false);
    const link = linkOf(id);
    if (link.hash === location.hash) history.replaceState(null, "", location.pathname + location.search);
    link.focus({ preventScroll: link.closest("tr").hidden });
  }

  const linkOf = (id) => document.querySelector(`#collection-table [data-open="${id}"]`);
  const mark = (id, isOpen) => linkOf(id).setAttribute("aria-expanded", isOpen);

  // Opens the collection that the page's address names behind its `#`, also where the filter hides its row.
  const rowsByName = new Map(all("#collection-table tbody tr").map((row) => [row.dataset.name, row]));
  function follow() {
    const lost = document.getElementById("lost");
    const name = nameIn(location.hash);
    const row = rowsByName.get(name);
    if (lost) {
      lost.hidden = !name || Boolean(row) || document.getElementById(name) !== null;
      lost.textContent = `This page has no collection ${name}.`;
      if (!lost.hidden) lost.scrollIntoView({ block: "center" });
    }
    const link = row?.querySelector("[data-open]");
    if (link) open(link.dataset.open);
    else if (row) { // broken: there is nothing to open but its remark
      clear("collection-table");
      row.scrollIntoView({ block: "center" });
      row.querySelector("th").focus({ preventScroll: true });
    }
  }

  function nameIn(hash) {
    const written = hash.slice(1).replace(/^saves\//, "").replace(/\/$/, "");
    try {
      return decodeURIComponent(written);
    } catch { // a name with a % that a user did not encode
      return written;
    }
  }

  async function copy(button) {
    const code = button.closest("article").querySelector("pre code");
    try {
      await navigator.clipboard.writeText(code.textContent);
      button.textContent = "Copied";
    } catch { // no permission: mark it, so that the user's own copy takes it
      getSelection().selectAllChildren(code);
      button.textContent = "Marked";
    }
  }

  // ---- pictures
  const axis = (more) => ({
    gridcolor: css("line"), linecolor: css("line"), zerolinecolor: css("line"), automargin: true, ...more,
  });
  const text = (words) => ({ text: words, standoff: 6, font: { size: 12 } });
  const share = (number, of) => text(`component ${number} (${percent(of[number - 1])} of the variance)`);
  const percent = (value) => (value >= 0.0995 ? (100 * value).toFixed(0) : (100 * value).toPrecision(2)) + "\u00a0%";
  const layout = (more) => ({
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", dragmode: false, hovermode: "closest",
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: css("ink") },
    margin: { l: 8, r: 8, t: 8, b: 8 }, showlegend: false,
    hoverlabel: { bgcolor: css("panel"), bordercolor: css("line"), font: { color: css("ink") } }, ...more,
  });
  const scale = () => [[0, css("low")], [0.5, css("middle")], [1, css("high")]];
  // A name's own text: Plotly reads a few tags in texts.
  const plain = (name) => String(name).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");

  function curve({ lines, kept, resumed }) {
    const colour = { pretrain: css("c1"), finetune: css("c0") };
    const traces = lines.flatMap(({ name, step, loss, rate }) =>
      [["loss", loss, "y"], ["learning rate", rate, "y2"]].map(([what, values, yaxis]) => ({
        x: step, y: values, yaxis, name, showlegend: yaxis === "y", legendgroup: name, mode: "lines+markers",
        line: { color: colour[name], width: 1.6, dash: name === "pretrain" ? "dot" : "solid" },
        marker: { size: step.length > 120 ? 2 : 4, symbol: name === "pretrain" ? "square" : "circle" },
        hovertemplate: `${name}, step %{x}<br>${what} %{y:.4g}<extra></extra>`,
      })));
    const window = { type: "rect", xref: "x", yref: "paper", x0: kept[0] - 0.5, x1: kept[1] + 0.5, y0: 0, y1: 1,
      fillcolor: css("window"), line: { width: 0 }, layer: "below" };
    const start = { type: "line", xref: "x", yref: "paper", x0: resumed, x1: resumed, y0: 0, y1: 1, layer: "below",
      line: { color: css("quiet"), width: 1, dash: "dash" } };
    return [traces, layout({
      showlegend: true, legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom" },
      xaxis: axis({ title: text("optimizer step"), anchor: "y2" }),
      yaxis: axis({ title: text("loss"), domain: [0.42, 1], rangemode: "tozero" }),
      yaxis2: axis({ title: text("learning rate"), domain: [0, 0.34], rangemode: "tozero", exponentformat: "e", nticks: 4 }),
      shapes: resumed === null ? [window] : [window, start],
      annotations: [{ text: "kept", xref: "x", yref: "paper", x: (kept[0] + kept[1]) / 2, y: 1, yanchor: "top",
        showarrow: false, font: { color: css("complete") } }],
    })];
  }

  function scores({ step, value, low, high, base, best, axis: what }) {
    const first = step[0] - (step.length > 1 ? 0 : 0.5);
    const last = step[step.length - 1] + (step.length > 1 ? 0 : 0.5);
    const known = step.map((_, place) => place).filter((place) => low[place] !== null);
    const edge = (values, fill) => ({
      x: known.map((place) => step[place]), y: known.map((place) => values[place]), mode: "lines", fill, showlegend: false,
      line: { width: 0, color: css("c0") }, fillcolor: css("band"), hoverinfo: "skip",
    });
    const span = (place) => `<br>${low[place].toPrecision(3)} to ${high[place].toPrecision(3)}`;
    const between = step.map((_, place) => (low[place] === null ? "" : span(place)));
    const traces = [edge(low, "none"), edge(high, "tonexty")];
    if (base !== null) {
      traces.push({ x: [first, last], y: [base, base], mode: "lines", name: "base model",
        line: { color: css("c1"), width: 1.6, dash: "dash" }, hovertemplate: "base model %{y:.4g}<extra></extra>" });
    }
    traces.push({
      x: step, y: value, name: "checkpoints", mode: "lines+markers", line: { color: css("c0"), width: 1.6 },
      marker: { size: step.length > 60 ? 3 : 5 }, text: between,
      hovertemplate: "step %{x}: %{y:.4g}%{text}<extra></extra>",
      error_y: { visible: step.length === 1 && known.length === 1, symmetric: false, thickness: 1.2,
        array: [high[0] - value[0]], arrayminus: [value[0] - low[0]] },
    }, {
      x: [step[best]], y: [value[best]], name: `best, step ${step[best]}`, mode: "markers", hoverinfo: "skip",
      marker: { symbol: "star", size: 14, color: css("c4"), line: { color: css("ink"), width: 1 } },
    });
    return [traces, layout({
      showlegend: true, legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", traceorder: "normal" },
      xaxis: axis({ title: text("optimizer step"), tickformat: "d", ...(step.length > 1 ? {} : { tickvals: step }) }),
      yaxis: axis({ title: text(what) }),
    })];
  }

  function trajectory({ x, y, step, share: of }) {
    const last = step.length - 1;
    const label = (place, words) => ({ x: x[place], y: y[place], text: words, showarrow: false, yshift: 12 });
    return [[{
      x, y, mode: "lines+markers", text: step.map(String), hovertemplate: "step %{text}<extra></extra>",
      line: { color: css("line"), width: 1.2 },
      marker: { color: step, colorscale: scale(), size: 8, line: { color: css("quiet"), width: 0.7 }, showscale: true,
        colorbar: { title: text("step"), thickness: 10, outlinewidth: 0, tickformat: "d", nticks: 6 } },
    }], layout({
      xaxis: axis({ title: share(1, of) }), yaxis: axis({ title: share(2, of), scaleanchor: "x" }),
      annotations: [label(0, `step ${step[0]}`), label(last, `step ${step[last]}`)],
    })];
  }

  function heat({ layers, groups, steps, width, shades, low, high }) {
    const bytes = Uint8Array.from(atob(shades), (letter) => letter.charCodeAt(0));
    const number = (byte) => (byte > 1 ? low + ((byte - 2) / 253) * (high - low) : null);
    const rows = layers.map((_, row) => [...bytes.subarray(row * steps.length, (row + 1) * steps.length)]);
    const said = (byte) => (byte > 1 ? (10 ** number(byte)).toPrecision(2) : byte ? "0" : "not known");
    const names = steps.map((step) => (width > 1 ? `from step ${step}` : `step ${step}`));
    let first = 0;
    const middles = groups.map(([, count]) => (first += count) - count / 2 - 0.5);
    const borders = middles.slice(0, -1).map((middle, place) => middle + groups[place][1] / 2);
    const ticks = [];
    for (let power = Math.ceil(low); power <= high; power++) ticks.push(power);
    const bar = ticks.length > 1 ? ticks : [low, high];
    return [[{
      type: "heatmap", z: rows.map((row) => row.map(number)), x: steps.map((_, place) => place), colorscale: scale(),
      zmin: low, zmax: high, hoverongaps: false, xgap: 0,
      text: rows.map((row, place) => row.map((byte, at) => `${plain(layers[place])}<br>${names[at]}: ${said(byte)}`)),
      hovertemplate: "%{text}<extra></extra>",
      colorbar: { title: { text: "relative change", side: "right", font: { size: 12 } }, thickness: 10, outlinewidth: 0,
        tickvals: bar,
        ticktext: bar.map((power) => (10 ** power).toPrecision(ticks.length > 1 ? 1 : 2).replace("e", " e")) },
    }], layout({
      xaxis: axis({ title: text("optimizer step"), showgrid: false, ...ticksOf(steps) }),
      yaxis: axis({ autorange: "reversed", showgrid: false, zeroline: false, tickvals: middles,
        ticktext: groups.map(([kind]) => plain(kind)) }),
      shapes: borders.map((y) => ({ type: "line", xref: "paper", x0: 0, x1: 1, y0: y, y1: y,
        line: { color: css("ground"), width: 1.5 } })),
    })];
  }

  function ticksOf(steps) {
    const every = Math.max(1, Math.ceil(steps.length / 6));
    const places = steps.map((_, place) => place).filter((place) => place % every === 0);
    return { tickvals: places, ticktext: places.map((place) => String(steps[place])), tickangle: 0 };
  }

  // ---- the map
  const map = json("map");
  const chooser = document.getElementById("colour");
  const order = new Intl.Collator("en", { numeric: true });

  function kinds() { // of what the map is coloured by: value -> colour and symbol
    const key = chooser.value;
    const owners = new Set(map.panels.flatMap((panel) => panel.owner ?? []));
    const values = [...new Set([...owners].map((owner) => map.collections[owner][key]))];
    values.sort((a, b) => order.compare(a, b));
    return new Map(values.map((value, place) => [value, {
      colour: css("c" + (place % colours)), symbol: symbols[(place + Math.floor(place / (colours * symbols.length))) % symbols.length],
    }]));
  }

  function mapPanel({ owner, step, x, y, zero, share: of }) {
    const looks = kinds();
    const key = chooser.value;
    const traces = [...looks].map(([value, { colour, symbol }]) => {
      const places = owner.flatMap((one, place) => (map.collections[one][key] === value ? [place] : []));
      return {
        x: places.map((place) => x[place]), y: places.map((place) => y[place]), mode: "markers", name: plain(value),
        marker: { color: colour, symbol, size: 7, opacity: 0.8, line: { color: css("ground"), width: 0.5 } },
        text: places.map((place) => {
          const { dataset, model, rank } = map.collections[owner[place]];
          return `${plain(dataset)}, ${plain(model)}, rank ${rank}<br>step ${step[place]}`;
        }),
        hovertemplate: "%{text}<extra></extra>",
      };
    }).filter((trace) => trace.x.length);
    traces.push({ x: [zero[0]], y: [zero[1]], mode: "markers", name: "base model", hovertemplate: "base model<extra></extra>",
      marker: { symbol: "cross-thin", size: 13, line: { color: css("ink"), width: 2 } } });
    return [traces, layout({
      xaxis: axis({ title: share(1, of) }), yaxis: axis({ title: share(2, of), scaleanchor: "x" }),
    })];
  }

  const shapes = { // for the legend, in a box of 16
    circle: "M8 2a6 6 0 1 0 .01 0z", square: "M3 3h10v10H3z", diamond: "M8 1l7 7-7 7-7-7z", "triangle-up": "M8 2l7 12H1z",
    x: "M4 1l4 4 4-4 3 3-4 4 4 4-3 3-4-4-4 4-3-3 4-4-4-4z", star: "M8 1l2 5h5l-4 3.5L12.500 15 8 11.500 3.500 15 5 9.500 1 6h5z",
    "triangle-down": "M8 14L1 2h14z", pentagon: "M8 1l7 5.300-2.700 8.200H3.700L1 6.300z",
  };

  function drawLegend() {
    document.getElementById("legend").replaceChildren(...[...kinds()].map(([value, { colour, symbol }]) => {
      const item = document.createElement("li");
      const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
      const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
      svg.setAttribute("viewBox", "0 0 16 16");
      svg.setAttribute("aria-hidden", "true");
      path.setAttribute("d", shapes[symbol]);
      path.setAttribute("fill", colour);
      svg.append(path);
      item.append(svg, chooser.value === "rank" ? `rank ${value}` : value);
      return item;
    }));
  }

  const makers = { curve, scores, trajectory, heat, map: mapPanel };

  function draw(element) {
    const { kind, of } = element.dataset;
    const data = kind === "map" ? map.panels[of] : json(of)[kind];
    Plotly.react(element, ...makers[kind](data), { displayModeBar: false, responsive: true });
    drawn.set(element, kind);
  }

  const coming = new IntersectionObserver((entries) => {
    for (const { isIntersecting, target } of entries) {
      if (isIntersecting) {
        coming.unobserve(target);
        draw(target);
      }
    }
  }, { rootMargin: "200px" });

  // ---- what the user does
  document.addEventListener("click", ({ target }) => {
    const link = target.closest("a[data-open]"); // its new address opens it, unless the page has that address already
    if (link && link.hash === location.hash) follow();
    const button = target.closest("button");
    if (!button) return;
    if (button.closest("thead")) sortBy(button.closest("th"));
    else if (button.dataset.turn) turn(button.dataset.turn);
    else if (button.dataset.clear) clear(button.dataset.clear).focus();
    else if (button.dataset.close) close(button.dataset.close);
    else if (button.dataset.copy) copy(button);
  });
  for (const event of ["input", "change"]) {
    document.addEventListener(event, ({ target }) => target.dataset.for && filter(target.dataset.for));
  }
  document.addEventListener("change", ({ target }) => {
    if (target.dataset.sort) sortBy(all("thead th", document.getElementById(target.dataset.sort))[target.value], true);
  });
  addEventListener("hashchange", follow);
  chooser?.addEventListener("change", () => {
    drawLegend();
    drawn.forEach((kind, element) => kind === "map" && draw(element));
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    if (chooser) drawLegend();
    drawn.forEach((_, element) => draw(element));
  });
  if (chooser) drawLegend();
  all("select[data-sort]").forEach(fillSorter);
  all("input[data-for]").forEach((box) => filter(box.dataset.for)); // a browser may have kept what was typed
  all("main .plot").forEach((element) => coming.observe(element));
  follow();
})();
