// Shows where the model looked for a word, in every .sat of the document, also in those that are
// added later. A notebook runs this once for each of its views; later runs do nothing.
(() => {
  if (window.satReady) return;
  window.satReady = true;
  const closest = (event, selector) => event.target.closest?.(selector);
  const wordsOf = (view) => [...view.querySelectorAll(".sat-word")];

  // Shows a word's heat map of attention or evidence, or the photograph if there is no word.
  function show(view, shown) {
    const kind = view.querySelector(".sat-evidence")?.checked ? "evidence" : "attention";
    const status = view.querySelector(".sat-where"), words = wordsOf(view);
    for (const word of words) word.classList.toggle("sat-shown", word === shown);
    view.querySelectorAll(".sat-heat").forEach((heat, i) => heat.classList.toggle(
      "sat-shown", heat.dataset.kind === kind && words[i % words.length] === shown));
    view.classList.toggle("sat-looking", Boolean(shown));
    status.textContent = shown ? `${shown.textContent}: ${shown.dataset[kind]}` : status.dataset.hint;
  }

  // A selected word stays when the mouse leaves.
  function select(view, selected) {
    wordsOf(view).forEach((word) => word.setAttribute("aria-pressed", word === selected));
    show(view, selected);
  }

  document.addEventListener("pointerover", (event) => {
    const word = closest(event, ".sat-word");
    if (event.pointerType === "touch") return;
    if (word) show(closest(event, ".sat"), word);
    if (closest(event, ".sat-words")) return; // between two words
    for (const view of document.querySelectorAll(".sat-looking")) {
      show(view, view.querySelector("[aria-pressed=true]"));
    }
  });
  document.addEventListener("click", (event) => {
    const view = closest(event, ".sat"), word = closest(event, ".sat-word");
    if (word) select(view, word.getAttribute("aria-pressed") === "true" ? null : word);
    else if (closest(event, ".sat-picture")) select(view, null);
  });
  document.addEventListener("change", (event) => {
    const view = closest(event, ".sat");
    if (closest(event, ".sat-evidence")) show(view, view.querySelector("[aria-pressed=true]"));
  });
  document.addEventListener("focusin", (event) => {
    const view = closest(event, ".sat"), focused = closest(event, ".sat-word");
    if (!focused?.matches(":focus-visible")) return; // by a click, which selects it
    wordsOf(view).forEach((word) => { word.tabIndex = word === focused ? 0 : -1; });
    select(view, focused);
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") document.querySelectorAll(".sat").forEach((view) => select(view));
    const word = closest(event, ".sat-word"), next = word?.matches(":dir(rtl)") ? -1 : 1;
    const step = { ArrowRight: next, ArrowLeft: -next }[event.key];
    if (!word || !step || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    event.stopPropagation(); // a notebook uses the arrow keys too
    const words = wordsOf(closest(event, ".sat"));
    words[words.indexOf(word) + step]?.focus();
  }, true);
})();
