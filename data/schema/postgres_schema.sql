-- The shop's master data in PostgreSQL 14 or later: catalogue, accounts and orders.
--
--   psql -d shop -f data/schema/postgres_schema.sql
--
-- Running it again changes nothing. Every moment is a timestamptz, every amount is in the shop's one currency.
-- The recommender's reader does not touch users, where the names and addresses of people are. A role for it needs no more than
--
--   GRANT SELECT ON orders, order_items, items, item_history, categories TO recommender;

BEGIN;
SET LOCAL client_min_messages = warning; -- no notice per table that is already there

-- People ------------------------------------------------------------------------------------------------------------

CREATE TABLE IF NOT EXISTS users (
    user_id    text        PRIMARY KEY CHECK (user_id <> ''),
    email      text        UNIQUE CHECK (email LIKE '%_@_%'),
    name       text,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now()
);
COMMENT ON TABLE  users            IS 'Accounts. Personal data is here and nowhere else.';
COMMENT ON COLUMN users.user_id    IS 'Pseudonym, without a meaning outside of this table; through orders it is all that the recommender gets to know.';
COMMENT ON COLUMN users.email      IS 'Personal data, never leaves this database; null after erasure.';
COMMENT ON COLUMN users.name       IS 'Personal data, never leaves this database; null after erasure.';
COMMENT ON COLUMN users.created_at IS 'When the account was opened.';
COMMENT ON COLUMN users.updated_at IS 'Last change of the account, kept by a trigger.';

-- Catalogue ---------------------------------------------------------------------------------------------------------

CREATE TABLE IF NOT EXISTS categories (
    category_id text PRIMARY KEY CHECK (category_id <> ''),
    parent_id   text REFERENCES categories,
    name        text NOT NULL CHECK (name <> ''),
    CHECK (parent_id <> category_id)
);
CREATE INDEX IF NOT EXISTS categories_parent ON categories (parent_id);
COMMENT ON TABLE  categories             IS 'A tree: every category but the roots has one parent.';
COMMENT ON COLUMN categories.category_id IS 'The shop''s own id.';
COMMENT ON COLUMN categories.parent_id   IS 'The category above; null at a root. A longer cycle is refused by the reader.';
COMMENT ON COLUMN categories.name        IS 'As shoppers see it; a path of names becomes category_path.';

CREATE TABLE IF NOT EXISTS items (
    item_id     text          PRIMARY KEY CHECK (item_id <> ''),
    category_id text          REFERENCES categories,
    title       text          NOT NULL,
    description text,
    brand       text          CHECK (brand <> ''),
    price       numeric(12,2) NOT NULL CHECK (price >= 0),
    discount    numeric(5,4)  NOT NULL DEFAULT 0 CHECK (discount BETWEEN 0 AND 1),
    margin      numeric(5,4)  CHECK (margin BETWEEN 0 AND 1),
    stock       integer       NOT NULL DEFAULT 0 CHECK (stock >= 0),
    created_at  timestamptz   NOT NULL DEFAULT now(),
    updated_at  timestamptz   NOT NULL DEFAULT now(),
    CHECK (updated_at >= created_at)
);
ALTER TABLE items ADD COLUMN IF NOT EXISTS brand text CHECK (brand <> ''); -- for a table made before there was one
CREATE INDEX IF NOT EXISTS items_category ON items (category_id);
CREATE INDEX IF NOT EXISTS items_updated  ON items (updated_at);
COMMENT ON TABLE  items             IS 'The catalogue as it is now; item_history is how it was.';
COMMENT ON COLUMN items.item_id     IS 'The shop''s own id.';
COMMENT ON COLUMN items.category_id IS 'The most specific category; null when there is none yet.';
COMMENT ON COLUMN items.title       IS 'As shoppers see it.';
COMMENT ON COLUMN items.description IS 'Longer text, for content-based recommendations.';
COMMENT ON COLUMN items.brand       IS 'Maker, as shoppers know it; null when it is not known.';
COMMENT ON COLUMN items.price       IS 'Per unit before the discount.';
COMMENT ON COLUMN items.discount    IS 'Share of the price taken off, 0 to 1.';
COMMENT ON COLUMN items.margin      IS 'Share of the price that is profit, 0 to 1; null when it is not known.';
COMMENT ON COLUMN items.stock       IS 'Units on hand; 0 is sold out.';
COMMENT ON COLUMN items.created_at  IS 'When the item entered the shop.';
COMMENT ON COLUMN items.updated_at  IS 'Last change, kept by a trigger; an import of old changes may set it itself, forwards only.';

CREATE TABLE IF NOT EXISTS item_history (
    item_id     text          NOT NULL REFERENCES items ON DELETE CASCADE,
    valid_from  timestamptz   NOT NULL CHECK (valid_from = date_trunc('milliseconds', valid_from, 'UTC')),
    category_id text          REFERENCES categories,
    title       text          NOT NULL,
    description text,
    brand       text,
    price       numeric(12,2) NOT NULL CHECK (price >= 0),
    discount    numeric(5,4)  NOT NULL CHECK (discount BETWEEN 0 AND 1),
    margin      numeric(5,4)  CHECK (margin BETWEEN 0 AND 1),
    available   boolean       NOT NULL,
    PRIMARY KEY (item_id, valid_from)
);
ALTER TABLE item_history ADD COLUMN IF NOT EXISTS brand text;
CREATE INDEX IF NOT EXISTS item_history_valid_from ON item_history (valid_from, item_id);
CREATE INDEX IF NOT EXISTS item_history_category   ON item_history (category_id);
COMMENT ON TABLE  item_history             IS 'What shoppers saw of an item from valid_from on. Written by triggers on items; nobody edits it.';
COMMENT ON COLUMN item_history.item_id     IS 'The item.';
COMMENT ON COLUMN item_history.valid_from  IS 'From this moment, in whole milliseconds; the row holds until the next one of the item.';
COMMENT ON COLUMN item_history.category_id IS 'As in items.';
COMMENT ON COLUMN item_history.title       IS 'As in items.';
COMMENT ON COLUMN item_history.description IS 'As in items.';
COMMENT ON COLUMN item_history.brand       IS 'As in items.';
COMMENT ON COLUMN item_history.price       IS 'As in items.';
COMMENT ON COLUMN item_history.discount    IS 'As in items.';
COMMENT ON COLUMN item_history.margin      IS 'As in items.';
COMMENT ON COLUMN item_history.available   IS 'Whether there was stock. Every sale changes the stock, few change this.';

-- Orders ------------------------------------------------------------------------------------------------------------

CREATE TABLE IF NOT EXISTS orders (
    order_id   bigint      GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY,
    user_id    text        REFERENCES users ON DELETE SET NULL,
    status     text        NOT NULL DEFAULT 'placed'
                           CHECK (status IN ('placed', 'paid', 'shipped', 'delivered', 'cancelled', 'refunded')),
    ordered_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX IF NOT EXISTS orders_ordered ON orders (ordered_at, order_id);
CREATE INDEX IF NOT EXISTS orders_user    ON orders (user_id, ordered_at DESC);
COMMENT ON TABLE  orders            IS 'One row per basket that was ordered.';
COMMENT ON COLUMN orders.order_id   IS 'Number of the order.';
COMMENT ON COLUMN orders.user_id    IS 'Who ordered; null for a guest and after the account was deleted.';
COMMENT ON COLUMN orders.status     IS 'placed, paid, shipped, delivered; cancelled before it was sent; refunded after.';
COMMENT ON COLUMN orders.ordered_at IS 'When the shopper ordered; never changes.';
COMMENT ON COLUMN orders.updated_at IS 'Last change of the status, kept by a trigger.';

CREATE TABLE IF NOT EXISTS order_items (
    order_id bigint        NOT NULL REFERENCES orders ON DELETE CASCADE,
    line     integer       NOT NULL CHECK (line > 0),
    item_id  text          NOT NULL REFERENCES items,
    quantity integer       NOT NULL CHECK (quantity > 0),
    price    numeric(12,2) NOT NULL CHECK (price >= 0),
    PRIMARY KEY (order_id, line)
);
CREATE INDEX IF NOT EXISTS order_items_item ON order_items (item_id);
COMMENT ON TABLE  order_items          IS 'The lines of an order; they do not change once it is placed.';
COMMENT ON COLUMN order_items.order_id IS 'The order.';
COMMENT ON COLUMN order_items.line     IS '1 is the first line; with the order''s number it identifies the purchase for good.';
COMMENT ON COLUMN order_items.item_id  IS 'What was bought.';
COMMENT ON COLUMN order_items.quantity IS 'Units.';
COMMENT ON COLUMN order_items.price    IS 'Paid per unit.';

-- Triggers ----------------------------------------------------------------------------------------------------------

-- updated_at is the moment of the transaction, unless the statement gives one; it never goes back. A transaction that had to
-- wait for another one's lock began before that one's change, hence greatest().
CREATE OR REPLACE FUNCTION touch_updated_at() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.updated_at = OLD.updated_at THEN
        NEW.updated_at := greatest(now(), OLD.updated_at);
    ELSIF NEW.updated_at < OLD.updated_at THEN
        RAISE EXCEPTION 'updated_at of % would go back from % to %', TG_TABLE_NAME, OLD.updated_at, NEW.updated_at
            USING ERRCODE = 'check_violation';
    END IF;
    RETURN NEW;
END $$;
COMMENT ON FUNCTION touch_updated_at() IS 'Keeps updated_at true and moving forwards.';

CREATE OR REPLACE TRIGGER users_touch  BEFORE UPDATE ON users  FOR EACH ROW EXECUTE FUNCTION touch_updated_at();
CREATE OR REPLACE TRIGGER items_touch  BEFORE UPDATE ON items  FOR EACH ROW EXECUTE FUNCTION touch_updated_at();
CREATE OR REPLACE TRIGGER orders_touch BEFORE UPDATE ON orders FOR EACH ROW EXECUTE FUNCTION touch_updated_at();

-- A new item, or a change of what shoppers see, is a row of item_history. Several changes within one millisecond are one row, the
-- last: nobody saw the others.
CREATE OR REPLACE FUNCTION write_item_history() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO item_history (item_id, valid_from, category_id, title, description, brand, price, discount, margin, available)
    VALUES (NEW.item_id, date_trunc('milliseconds', NEW.updated_at, 'UTC'), NEW.category_id, NEW.title, NEW.description,
            NEW.brand, NEW.price, NEW.discount, NEW.margin, NEW.stock > 0)
    ON CONFLICT (item_id, valid_from) DO UPDATE SET
        category_id = excluded.category_id, title = excluded.title, description = excluded.description,
        brand = excluded.brand, price = excluded.price, discount = excluded.discount, margin = excluded.margin, available = excluded.available;
    RETURN NULL;
END $$;
COMMENT ON FUNCTION write_item_history() IS 'Writes the item as it is now into item_history.';

CREATE OR REPLACE TRIGGER items_inserted AFTER INSERT ON items FOR EACH ROW EXECUTE FUNCTION write_item_history();
CREATE OR REPLACE TRIGGER items_changed AFTER UPDATE ON items FOR EACH ROW
    WHEN ((OLD.category_id, OLD.title, OLD.description, OLD.brand, OLD.price, OLD.discount, OLD.margin, OLD.stock > 0)
          IS DISTINCT FROM
          (NEW.category_id, NEW.title, NEW.description, NEW.brand, NEW.price, NEW.discount, NEW.margin, NEW.stock > 0))
    EXECUTE FUNCTION write_item_history();

COMMIT;
