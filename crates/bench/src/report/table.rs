//! A table that is printed on the terminal and in the page alike.

use std::fmt::Write as _;

use super::escape;

/// Text in rows; the first column is on the left, the others on the right.
#[derive(Debug, Clone, Default)]
pub(crate) struct Table {
    pub(crate) title: String,
    /// What has to be known to read it; may be empty.
    pub(crate) note: String,
    pub(crate) columns: Vec<String>,
    pub(crate) rows: Vec<Vec<String>>,
}

impl Table {
    /// Without rows.
    pub(crate) fn new(title: impl Into<String>, note: impl Into<String>, columns: &[&str]) -> Self {
        let columns = columns.iter().map(|column| (*column).to_string()).collect();
        Table { title: title.into(), note: note.into(), columns, rows: Vec::new() }
    }

    /// For the terminal.
    pub(crate) fn text(&self) -> String {
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column)).chain(self.columns.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..self.columns.len()).map(width).collect();
        let mut text = format!("{}\n", self.title);
        if !self.note.is_empty() {
            let _ = writeln!(text, "  ({})", self.note);
        }
        for row in std::iter::once(&self.columns).chain(&self.rows) {
            let mut line = String::from(" ");
            for (column, (cell, width)) in row.iter().zip(&widths).enumerate() {
                let _ = if column == 0 {
                    write!(line, " {cell:<width$}")
                } else {
                    write!(line, "  {cell:>width$}")
                };
            }
            let _ = writeln!(text, "{}", line.trim_end());
        }
        text.push('\n');
        text
    }

    /// For the page, with the title as a heading of this level.
    pub(crate) fn html(&self, level: u8) -> String {
        let mut html = format!("<h{level}>{}</h{level}>\n", escape(&self.title));
        if !self.note.is_empty() {
            let _ = writeln!(html, "<p>{}</p>", escape(&self.note));
        }
        let row = |cells: &[String], tag: &str| {
            let cells: String = cells.iter().map(|cell| format!("<{tag}>{}", escape(cell))).collect();
            format!("<tr>{cells}</tr>\n")
        };
        let rows: String = self.rows.iter().map(|cells| row(cells, "td")).collect();
        let _ = writeln!(html, "<table>\n{}{rows}</table>", row(&self.columns, "th"));
        html
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_markup_is_escaped() {
        let mut table = Table::new("t<1>", "", &["case", "iops"]);
        table.rows = vec![vec!["a".into(), "1000".into()], vec!["longer".into(), "5".into()]];
        assert_eq!(table.text(), "t<1>\n  case    iops\n  a       1000\n  longer     5\n\n");
        assert!(table.html(2).starts_with("<h2>t&lt;1&gt;</h2>"));
    }
}
