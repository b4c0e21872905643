// Shows where the model looked for a word, in every .sat of the document. A notebook runs this once
// for each of its views, so views that are already set up are skipped.
(() => {
  const UPSCALE = 8; // pixels of the mask per location; the browser interpolates between them
  const mask = document.createElement("canvas"), dim = document.createElement("canvas");

  // An index reflected into 0..n-1, at the centres or the outer edges of the first and last pixel.
  function mirrorAtCentre(i, n) {
    const period = Math.max(1, 2 * n - 2), at = ((i % period) + period) % period;
    return at < n ? at : period - at;
  }

  function mirrorAtEdge(i, n) {
    const at = ((i % (2 * n)) + 2 * n) % (2 * n);
    return at < n ? at : 2 * n - 1 - at;
  }

  // (side * UPSCALE, side): the weight of each location in each pixel along one edge; rows sum to 1.
  // Like scikit-image's pyramid_expand in attention.py: linear interpolation, then a Gaussian blur.
  function upsamplingWeights(side) {
    const size = side * UPSCALE, sigma = UPSCALE / 3, radius = Math.round(4 * sigma);
    const linear = Array.from({ length: size }, (_, pixel) => {
      const position = (pixel + 0.5) / UPSCALE - 0.5, before = Math.floor(position);
      const row = new Array(side).fill(0);
      row[mirrorAtCentre(before, side)] += before + 1 - position;
      row[mirrorAtCentre(before + 1, side)] += position - before;
      return row;
    });
    return linear.map((_, pixel) => {
      const blurred = new Array(side).fill(0);
      let total = 0;
      for (let offset = -radius; offset <= radius; offset++) {
        const weight = Math.exp(-0.5 * (offset / sigma) ** 2);
        total += weight;
        linear[mirrorAtEdge(pixel + offset, size)].forEach((share, i) => {
          blurred[i] += weight * share;
        });
      }
      return blurred.map((share) => share / total);
    });
  }

  // Draws the attention into `mask` as opacity; the most attended place is opaque.
  function drawMask(alpha, side) {
    const weights = upsamplingWeights(side), size = side * UPSCALE, opacity = [];
    for (const row of weights) {
      const blended = Array.from({ length: side }, (_, x) =>
        row.reduce((sum, share, y) => sum + share * alpha[y * side + x], 0));
      for (const column of weights) {
        opacity.push(column.reduce((sum, share, x) => sum + share * blended[x], 0));
      }
    }
    const largest = opacity.reduce((a, b) => Math.max(a, b)) || 1;
    mask.width = mask.height = size;
    const pixels = new ImageData(size, size);
    opacity.forEach((value, i) => { pixels.data[4 * i + 3] = Math.round(255 * value / largest); });
    mask.getContext("2d").putImageData(pixels, 0, 0);
  }

  // Draws the photograph bright where the mask is opaque and dark grey elsewhere, as attention.py
  // does: weight * (0.45 + 0.55 * photograph) + (1 - weight) * 0.25 * grey, with weights from 0 to 1.
  function drawOverlay(canvas, photograph) {
    const width = photograph.naturalWidth, height = photograph.naturalHeight;
    function layer(context, operation, source) {
      context.globalCompositeOperation = operation;
      if (typeof source === "string") {
        context.fillStyle = source;
        context.fillRect(0, 0, width, height);
      } else {
        context.drawImage(source, 0, 0, width, height);
      }
    }
    dim.width = canvas.width = width;
    dim.height = canvas.height = height;
    const dark = dim.getContext("2d"), bright = canvas.getContext("2d");
    layer(dark, "source-over", photograph);
    layer(dark, "saturation", "#000"); // grey
    layer(dark, "source-over", "rgb(0 0 0 / 75%)");
    bright.imageSmoothingQuality = "high";
    layer(bright, "source-over", photograph);
    layer(bright, "source-over", "rgb(255 255 255 / 45%)");
    layer(bright, "destination-in", mask);
    layer(bright, "destination-over", dim);
  }

  function setUp(root) {
    const side = Number(root.dataset.side);
    const attention = Uint8Array.from(atob(root.dataset.attention), (c) => c.charCodeAt(0));
    const list = root.querySelector(".sat-words"), words = [...root.querySelectorAll(".sat-word")];
    const photograph = root.querySelector("img"), canvas = root.querySelector("canvas");
    const status = root.querySelector(".sat-where");
    // Indices of words, -1 for none. A hovered word is shown until the mouse leaves; a word that was
    // tapped, clicked or reached with keys stays selected.
    let hovered = -1, selected = -1, selectedBefore = -1;

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
      drawMask(attention.subarray(shown * side * side, (shown + 1) * side * side), side);
      drawOverlay(canvas, photograph);
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
