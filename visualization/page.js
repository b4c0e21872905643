// Shows where the model looked for a word, in every .sat of the document. A notebook runs this once
// for each of its views, so views that are already set up are skipped.
(() => {
  // How bright a location is says how much attention it has: overlay.py explains it, and the same
  // names and numbers are there.
  const DARK = 0.18, BRIGHT = 0.72, BLACK = 0.1, DEEPEST = 0.5, HIGHEST = 0.3;
  const LEAST = 0.3, LARGEST_GAIN = 2.5, LIGHT = [0.5 * DARK, 4], STEPS = 30;
  const CORRECTIONS = 3, RATIOS = [0.7, 2];

  const clip = (value, low, high) => Math.min(Math.max(value, low), high);
  const lumaOf = (rgb, i) => (0.299 * rgb[i] + 0.587 * rgb[i + 1] + 0.114 * rgb[i + 2]) / 255;
  const brightnessOf = (weight) => DARK + (BRIGHT - DARK) * (weight ** 0.6 + weight ** 2) / 2;

  // For each pixel of an edge, [location, share of the pixel in the location's mean] of a few.
  function locationMeans(side, size, offset) {
    const pixels = Array.from({ length: size }, () => []);
    for (let location = 0; location < side; location++) {
      const edge = (at) => size * clip(at / side + offset, 0, 1);
      const from = location ? edge(location) : 0;
      const to = location < side - 1 ? edge(location + 1) : size;
      for (let pixel = Math.floor(from); pixel < to; pixel++) {
        const shared = Math.min(to, pixel + 1) - Math.max(from, pixel);
        if (shared > 0) pixels[pixel].push([location, shared / (to - from)]);
      }
    }
    return pixels;
  }

  const bSpline = (t) => (t < 1 ? 2 / 3 - t * t + t ** 3 / 2 : Math.max(2 - t, 0) ** 3 / 6);
  const trapezoid = (t) => clip(1.5 - 2 * t, 0, 1);

  // For each pixel of an edge, [location, weight of the location in the pixel] of a few.
  function spreadWeights(side, size, offset, kernel) {
    const samples = Math.ceil(4 * side / size);
    return Array.from({ length: size }, (_, pixel) => {
      const weights = new Array(side).fill(0);
      for (let sample = 0; sample < samples; sample++) {
        const at = (pixel + (sample + 0.5) / samples) / size;
        const position = clip((at - offset) * side - 0.5, -1, side);
        for (let location = -2; location < side + 2; location++) {
          weights[clip(location, 0, side - 1)] += kernel(Math.abs(position - location));
        }
      }
      return [...weights.entries()].filter(([, weight]) => weight).map(
        ([location, weight]) => [location, weight / samples]);
    });
  }

  // Values of the locations, side * side of them, spread over the pixels, width * height of them.
  function spread(values, side, { rows, columns }) {
    const spreadOut = new Float32Array(rows.length * columns.length);
    rows.forEach((row, y) => {
      const line = Array.from({ length: side }, (_, x) => row.reduce(
        (sum, [location, weight]) => sum + weight * values[location * side + x], 0));
      columns.forEach((column, x) => {
        let sum = 0;
        for (const [location, weight] of column) sum += weight * line[location];
        spreadOut[y * columns.length + x] = sum;
      });
    });
    return spreadOut;
  }

  // The mean in each location, side * side of them, of pixels as `spread` returns them.
  function meansOf(pixels, side, { rows, columns }) {
    const means = new Float64Array(side * side);
    rows.forEach((row, y) => {
      const line = new Float64Array(side);
      columns.forEach((column, x) => {
        for (const [c, share] of column) line[c] += share * pixels[y * columns.length + x];
      });
      for (const [r, share] of row) {
        line.forEach((sum, c) => { means[r * side + c] += share * sum; });
      }
    });
    return means;
  }

  // What depends on the photograph alone.
  function prepare(canvas, photograph, side, [offsetX, offsetY]) {
    const width = canvas.width = photograph.naturalWidth;
    const height = canvas.height = photograph.naturalHeight;
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.drawImage(photograph, 0, 0);
    const rgb = context.getImageData(0, 0, width, height).data;
    const [smooth, flat] = [bSpline, trapezoid].map((kernel) => ({
      rows: spreadWeights(side, height, offsetY, kernel),
      columns: spreadWeights(side, width, offsetX, kernel) }));
    const means = { rows: locationMeans(side, height, offsetY),
                    columns: locationMeans(side, width, offsetX) };
    const own = Float32Array.from({ length: width * height }, (_, i) => lumaOf(rgb, 4 * i));
    const detail = spread(meansOf(own, side, means), side, smooth).map((around, i) => {
      const ratio = Math.log((own[i] + BLACK) / (around + BLACK));
      const limit = ratio > 0 ? HIGHEST : DEEPEST;
      return Math.exp(limit * Math.tanh(ratio / limit));
    });

    // The mean brightness that light of 1 at a location gives to each location.
    const effect = new Float64Array(side ** 4), locations = side * side;
    means.rows.forEach((row, y) => {
      const line = new Float64Array(locations);
      means.columns.forEach((column, x) => {
        const value = detail[y * width + x];
        for (const [c, share] of column) {
          for (const [k, weight] of smooth.columns[x]) line[c * side + k] += share * weight * value;
        }
      });
      for (const [r, share] of row) {
        for (const [j, weight] of smooth.rows[y]) {
          line.forEach((value, ck) => {
            const c = Math.floor(ck / side), k = ck % side;
            effect[(r * side + c) * locations + j * side + k] += share * weight * value;
          });
        }
      }
    });
    return { context, width, height, rgb, own, smooth, flat, means, detail, effect };
  }

  // Draws the photograph with attention (side * side, 0 to 255), as Canvas.draw of overlay.py.
  // colours: 256 x 3 bytes of a heat map, or null for light
  function drawOverlay(prepared, alpha, side, colours) {
    const { context, width, height, rgb, own, smooth, flat, means, detail, effect } = prepared;
    const weight = Array.from(alpha, (value) => value / 255), wanted = weight.map(brightnessOf);
    let light = wanted;
    for (let step = 0; step < STEPS; step++) {
      light = light.map((value, i) => {
        let found = 0;
        for (let j = 0; j < light.length; j++) found += effect[i * light.length + j] * light[j];
        return clip(value * wanted[i] / Math.max(found, 1e-6), ...LIGHT);
      });
    }
    let lumas = spread(light, side, smooth).map((value, i) => value * detail[i]);
    for (let step = 0; step < CORRECTIONS; step++) {
      const ratios = meansOf(lumas, side, means).map(
        (found, i) => clip(wanted[i] / Math.max(found, 1e-6), ...RATIOS));
      const ratio = spread(ratios, side, flat);
      lumas = lumas.map((luma, i) => Math.min(luma * ratio[i], 1));
    }
    const shares = spread(weight, side, smooth);
    const pixels = new ImageData(width, height), chroma = [0, 0, 0];
    lumas.forEach((luma, pixel) => {
      const at = 4 * pixel, share = clip(shares[pixel], 0, 1);
      let highest = 1e-6, lowest = 1e-6;
      const entry = 3 * Math.round(255 * share), brightness = colours && lumaOf(colours, entry);
      const gain = colours ? Math.min(1, 2 * share) * luma / brightness
        : Math.min(luma / (own[pixel] + BLACK / 2), LARGEST_GAIN) * (LEAST + (1 - LEAST) * share);
      for (let i = 0; i < 3; i++) {
        chroma[i] = gain * (colours ? colours[entry + i] / 255 - brightness
          : rgb[at + i] / 255 - own[pixel]);
        highest = Math.max(highest, chroma[i]);
        lowest = Math.max(lowest, -chroma[i]);
      }
      // Colours that cannot be shown are paled until they can; the brightness stays.
      const scale = Math.min(1, (1 - luma) / highest, luma / lowest);
      chroma.forEach((part, i) => {
        pixels.data[at + i] = Math.round(255 * (luma + scale * part));
      });
      pixels.data[at + 3] = 255;
    });
    context.putImageData(pixels, 0, 0);
  }

  function setUp(root) {
    const side = Number(root.dataset.side);
    const bytes = (base64) => Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
    const attention = bytes(root.dataset.attention);
    const colours = root.dataset.colours ? bytes(root.dataset.colours) : null;
    const list = root.querySelector(".sat-words"), words = [...root.querySelectorAll(".sat-word")];
    const photograph = root.querySelector("img"), canvas = root.querySelector("canvas");
    const status = root.querySelector(".sat-where");
    // Indices of words, -1 for none. A hovered word is shown until the mouse leaves; a word that was
    // tapped, clicked or reached with keys stays selected.
    let hovered = -1, selected = -1, selectedBefore = -1, prepared = null;

    function update() {
      const shown = hovered >= 0 ? hovered : selected;
      words.forEach((word, i) => {
        word.classList.toggle("sat-shown", i === shown);
        word.setAttribute("aria-selected", String(i === selected));
      });
      root.classList.toggle("sat-looking", shown >= 0);
      status.textContent = shown < 0 ? status.dataset.hint
        : `${words[shown].textContent}: ${words[shown].dataset.where}`;
      if (shown < 0) return;
      if (!photograph.naturalWidth) { // not loaded yet
        photograph.addEventListener("load", update, { once: true });
        return;
      }
      prepared ??= prepare(canvas, photograph, side, root.dataset.offset.split(" ").map(Number));
      const locations = side * side;
      drawOverlay(prepared, attention.subarray(shown * locations, (shown + 1) * locations), side,
                  colours);
    }

    function select(i) {
      selected = i;
      if (i >= 0) words.forEach((word, j) => { word.tabIndex = i === j ? 0 : -1; });
      update();
    }

    function showPhotograph() {
      hovered = -1;
      select(-1);
    }

    const indexOf = (event) => words.indexOf(event.target.closest(".sat-word"));

    if (!list) return; // a caption without words
    list.addEventListener("pointerover", (event) => {
      // Touch does not hover. Between two words the first stays shown, so that nothing flickers.
      if (event.pointerType === "touch" || indexOf(event) < 0) return;
      hovered = indexOf(event);
      update();
    });
    list.addEventListener("pointerleave", () => {
      hovered = -1;
      update();
    });
    list.addEventListener("focusin", (event) => select(indexOf(event)));
    // A second tap on a word deselects it. The tap also focuses and so selects the word before the
    // click event, hence selectedBefore.
    list.addEventListener("pointerdown", () => { selectedBefore = selected; });
    list.addEventListener("click", (event) => {
      if (indexOf(event) >= 0) select(indexOf(event) === selectedBefore ? -1 : indexOf(event));
      selectedBefore = -1;
    });
    list.addEventListener("keydown", (event) => {
      const at = indexOf(event), next = getComputedStyle(list).direction === "rtl" ? -1 : 1;
      const to = { ArrowRight: at + next, ArrowLeft: at - next, Home: 0, End: words.length - 1 }[
        event.key];
      if (to === undefined || event.altKey || event.ctrlKey || event.metaKey) return;
      event.preventDefault();
      event.stopPropagation(); // a notebook uses the arrow keys too
      hovered = -1;
      const word = Math.min(Math.max(to, 0), words.length - 1);
      words[word].focus();
      select(word);
    });
    canvas.addEventListener("click", showPhotograph);
    document.addEventListener("keydown", function escape(event) {
      // When a notebook's cell is run again, its old view is no longer in the document.
      if (!root.isConnected) document.removeEventListener("keydown", escape);
      else if (event.key === "Escape") showPhotograph();
    });
    update();
  }

  for (const root of document.querySelectorAll(".sat")) {
    if (!root.satReady) {
      root.satReady = true;
      setUp(root);
    }
  }
})();
