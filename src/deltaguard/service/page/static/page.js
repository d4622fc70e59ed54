"use strict";
// Shows what has changed on the server since the page was drawn, while somebody looks. Without this script the
// page loads itself anew now and then.
(() => {
  const main = document.querySelector("main");

  // What a reader unfolded stays so; what they are writing in is left alone.
  const replace = (old, drawn) => {
    if (old.contains(document.activeElement) && document.activeElement.matches("input, textarea")) return;
    const isOpen = [...old.querySelectorAll("details")].map((each) => each.open);
    const focused = old.contains(document.activeElement) ? document.activeElement.textContent : null;
    [...drawn.querySelectorAll("details")].forEach((each, place) => (each.open = isOpen[place] ?? false));
    old.replaceWith(drawn);
    if (focused) [...drawn.querySelectorAll("button, a")].find((each) => each.textContent === focused)?.focus();
  };

  const look = async () => {
    let drawn;
    try {
      const answer = await fetch(location.href, { cache: "no-store" });
      if (answer.redirected) return location.reload();
      if (!answer.ok) return again();
      drawn = new DOMParser().parseFromString(await answer.text(), "text/html");
    } catch {
      return again(); // The service is away, or the network: it may be back the next time.
    }
    for (const old of document.querySelectorAll(".live")) {
      const found = drawn.getElementById(old.id);
      if (found && found.innerHTML !== old.dataset.drawn) replace(old, remember(found));
    }
    main.dataset.live = drawn.querySelector("main").dataset.live ?? "";
    again();
  };

  const remember = (part) => {
    part.dataset.drawn = part.innerHTML;
    return part;
  };

  const again = () => {
    if (main.dataset.live) setTimeout(() => (document.hidden ? again() : look()), 1000 * main.dataset.live);
  };

  document.querySelectorAll(".live").forEach(remember);
  again();

  // A form that takes long says so, and is not sent twice.
  document.addEventListener("submit", ({ target, submitter }) => {
    if (!target.dataset.busy || !submitter) return;
    submitter.textContent = target.dataset.busy;
    setTimeout(() => (submitter.disabled = true));
  });
})();
