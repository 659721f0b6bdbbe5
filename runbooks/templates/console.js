"use strict";
// What the pages do beyond showing: keep themselves up to date, count seconds, copy commands. All of it can be missing.
(() => {
  const offset = Number(document.body.dataset.now) - Date.now() / 1000;
  const status = document.getElementById("live-status");
  const say = (text) => { if (status && status.textContent !== text) status.textContent = text; };

  const duration = (s) => s < 100 ? `${Math.max(0, s).toFixed(0)} s`
    : `${Math.floor(s / 60)} min ${String(Math.floor(s % 60)).padStart(2, "0")} s`;
  const tick = () => {
    for (const element of document.querySelectorAll("[data-since]"))
      element.textContent = duration(Date.now() / 1000 + offset - Number(element.dataset.since));
  };

  const copyable = () => {
    for (const button of document.querySelectorAll("button[data-copy][hidden]")) {
      button.hidden = false;
      button.addEventListener("click", async () => {
        const source = document.getElementById(button.dataset.copy);
        try {
          await navigator.clipboard.writeText(source.textContent);
          button.textContent = "Copied";
        } catch {
          getSelection().selectAllChildren(source);
          button.textContent = "Selected";
        }
        setTimeout(() => { button.textContent = "Copy"; }, 2000);
      });
    }
  };

  // The server renders; here a part of the page is replaced when the server's version of it has changed.
  const html = new Map();
  const parts = (root) => root.querySelectorAll("[data-part]");
  for (const part of parts(document)) html.set(part.id, null);
  let etag = "";
  let last = document.querySelector("#event-list > li:last-child")?.textContent.trim();

  const replace = (fresh) => {
    const old = document.getElementById(fresh.id);
    if (!old) return false;
    if (html.get(fresh.id) === fresh.innerHTML) return true;
    html.set(fresh.id, fresh.innerHTML);
    const focusable = "a, button, summary, input, select, [tabindex]";
    const at = [...old.querySelectorAll(focusable)].indexOf(document.activeElement);
    const open = [...old.querySelectorAll("details")].map((details) => details.open);
    old.className = fresh.className;
    old.replaceChildren(...document.importNode(fresh, true).childNodes);
    [...old.querySelectorAll("details")].forEach((details, i) => { if (i in open) details.open = open[i]; });
    if (at >= 0) { copyable(); old.querySelectorAll(focusable)[at]?.focus({ preventScroll: true }); }
    return true;
  };

  const poll = async () => {
    let answer;
    try {
      answer = await fetch(location.href, { headers: etag ? { "If-None-Match": etag } : {}, cache: "no-store" });
    } catch {
      say(`The console has not answered since ${new Date().toLocaleTimeString()}; trying on.`);
      return;
    }
    if (answer.status === 401) { say("The console was started anew: open the link that it shows."); return; }
    if (answer.status === 304) { if (status?.textContent.startsWith("The console")) say(""); return; }
    if (!answer.ok) { say(`The console says ${answer.status}; trying on.`); return; }
    etag = answer.headers.get("ETag") ?? "";
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    const known = [...parts(page)].map(replace).every(Boolean);
    if (!known || page.body.dataset.live !== document.body.dataset.live) { location.reload(); return; }
    copyable();
    tick();
    const news = page.querySelector("#event-list > li:last-child")?.textContent.trim();
    say(news && news !== last ? news : status?.textContent.startsWith("The console") ? "" : status?.textContent ?? "");
    last = news;
  };

  copyable();
  tick();
  if (document.body.dataset.live === "running") {
    setInterval(tick, 1000);
    const loop = async () => {
      if (!document.hidden) await poll();
      setTimeout(loop, Number(document.body.dataset.every ?? 1000));
    };
    setTimeout(loop, 300);
  }
})();
