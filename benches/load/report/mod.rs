//! What is printed and written.

pub(crate) mod json;
pub(crate) mod markdown;
pub(crate) mod scale;
pub(crate) mod svg;
pub(crate) mod text;

use std::{fs, path::Path};

use anyhow::{Context as _, Result};

use crate::{goals, suite::Results};

/// Writes all three files, and says how the goals stand.
pub(crate) fn write(results: &Results, folder: &Path) -> Result<()> {
    fs::create_dir_all(folder)?;
    let goals = goals::judge(results);
    for (name, text) in [
        ("results.json", json::write(results, &goals)?),
        ("results.md", markdown::write(results, &goals)),
        ("chart.svg", svg::write(results)),
    ] {
        fs::write(folder.join(name), text).with_context(|| format!("cannot write {name}"))?;
    }
    text::print(&text::goals(&goals));
    Ok(())
}
